//! MoBA, Mixture of Block Attention ([arXiv 2502.13189](https://arxiv.org/abs/2502.13189)), for [tch] and libtorch.
//!
//! # The mental model
//!
//! 1. **Route.** The keys of a sequence are cut into blocks of `block_size` tokens, and the mean of each block is scored
//!    against each query. A query selects the block it stands in and the `top_k - 1` best complete blocks before it:
//!    [`route`].
//! 2. **Attend.** For each block, the queries that selected it are gathered and attend to its tokens together, as dense
//!    matrix products: [`routed_attention`].
//! 3. **Merge.** The partial results of a query are weighted by their `lse`, the logarithm of the softmax denominator.
//!
//! [`moba_attention`] does all three and is differentiable; the routing counts as a constant. [`full_attention`] is the
//! dense counterpart, a [`HybridPolicy`] decides between the two for each layer and stage of training, [`Attention`] is the
//! layer that obeys it, and [`llama`] a language model of such layers.
//!
//! The operators are libtorch custom operators (`torch.ops.moba.*`), so autograd, autocast, TorchScript tracing and
//! `torch.compile` treat them as their own.
//!
//! ```
//! use tch::{Kind, Tensor};
//! use tch_moba::{MobaConfig, moba_attention};
//! let [q, k, v] = [8, 2, 2].map(|heads| Tensor::randn([1, heads, 300, 32], tch::kind::FLOAT_CPU));
//! let out = moba_attention(&q, &k, &v, &MobaConfig::new(64, 3)?)?; // 8 query heads read 2 key heads
//! assert_eq!((out.size(), out.kind()), (vec![1, 8, 300, 32], Kind::Float));
//! # Ok::<(), tch_moba::Error>(())
//! ```
//!
//! # Support
//!
//! | | CPU | CUDA (feature `cuda`) |
//! |---|---|---|
//! | dtype | float64, float32, bfloat16, float16 | the same |
//! | head_dim | any | up to 256 |
//! | block_size, top_k, lengths, head groups, strides | any | any |
//! | device | x86-64 | compute capability 8.0 and newer |
//!
//! Wrong input is an [`Error`] that names the argument, what was wanted and what was given. [`select`] tells which backend
//! takes given tensors and why another refuses them; with a `tracing` subscriber at debug level [`moba_attention`] says
//! so.

#![deny(missing_docs, unsafe_code)]

mod attention;
mod autocast;
mod config;
#[allow(unsafe_code)]
pub mod dispatch;
mod error;
mod full;
mod gradcheck;
mod hybrid;
pub mod llama;
mod ops;
mod rope;
mod select;

pub use attention::{Attention, AttentionConfig};
pub use autocast::autocast;
pub use config::MobaConfig;
pub use error::{Error, Result};
pub use full::full_attention;
pub use gradcheck::*;
pub use hybrid::{AttentionKind, CustomPolicy, HybridPolicy, Phase, Step};
pub use ops::{Packed, moba_attention, moba_attention_varlen, moba_attention_with_lse, route, routed_attention};
pub use select::*;

/// The README's example, compiled and run with the other documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
