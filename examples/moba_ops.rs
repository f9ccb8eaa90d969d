//! `libmoba_ops.so`: the operators as one shared library, for programs that are not written in Rust.
//!
//! `cargo build --release --example moba_ops` leaves it in `target/release/examples`. Loading it is all there is to do:
//! the operators register themselves with the libtorch that the program has loaded already.
//!
//! Python:
//! ```python
//! import torch
//! torch.ops.load_library("target/release/examples/libmoba_ops.so")
//! out, lse = torch.ops.moba.attention(q, k, v, 512, 3)      # block_size, top_k
//! model = torch.jit.load("model.pt")                        # TorchScript models that call the operators
//! ```
//!
//! C++:
//! ```cpp
//! dlopen("libmoba_ops.so", RTLD_NOW | RTLD_GLOBAL);         // or link with -lmoba_ops and call moba_ops_load()
//! auto op = c10::Dispatcher::singleton().findSchemaOrThrow("moba::attention", "");
//! auto model = torch::jit::load("model.pt");
//! ```
//!
//! Load it once per process, and not into one that links the Rust crate too: libtorch stops a process that registers the
//! same operators twice.

/// Does nothing but keep the operators in this library, and in a program that links it with `--as-needed`.
#[unsafe(no_mangle)]
pub extern "C" fn moba_ops_load() {
    tch_moba::dispatch::ensure_loaded();
}
