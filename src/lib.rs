//! MoBA, Mixture of Block Attention (arXiv 2502.13189), for [tch] and libtorch.

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
