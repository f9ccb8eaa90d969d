//! The test suite: one binary, every test on the CPU and, where there is one, on a GPU.
//!
//! `MOBA_REQUIRE_CUDA=1` turns a missing GPU into a failure, `MOBA_SUITE_SMALL=1` keeps to small shapes (for
//! compute-sanitizer), `MOBA_GOLDEN_DIR` says where the golden vectors lie.

mod gate;
mod golden;
mod kit;
mod naive;
mod oracle;
