//! The test suite: one binary, every test on the CPU and, where there is one, on a GPU.
//!
//! `MOBA_REQUIRE_CUDA=1` turns a missing GPU into a failure, `MOBA_SUITE_SMALL=1` keeps to small shapes (for
//! compute-sanitizer), `MOBA_GOLDEN_DIR` says where the golden vectors lie.

mod autocast;
mod autograd;
mod corners;
mod errors;
mod gate;
mod golden;
mod kit;
mod large;
mod laws;
mod layer;
mod llama;
mod naive;
mod oracle;
mod policy;
mod reference;
mod routed;
mod routing;
mod schema;
mod selection;
mod threads;
mod torchscript;
