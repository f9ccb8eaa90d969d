//! The operators as typed, safe functions. Signatures are written once, in csrc/schema.h; libtorch checks each call.

use tch::Tensor;

use crate::{
    Error, MobaConfig, Result,
    dispatch::{Value, call},
    select,
};

/// MoBA attention (arXiv 2502.13189, equations 2 to 6): `out [batch, heads, seqlen_q, head_dim]` in the dtype of `q`.
///
/// * `q [batch, heads, seqlen_q, head_dim]`, `k` and `v [batch, heads_k, seqlen_k, head_dim]`, with any strides.
/// * All three float32, float64, bfloat16 or float16, on one device.
/// * `heads` is a multiple of `heads_k`: query head `h` reads key head `h / (heads / heads_k)`.
/// * `seqlen_q <= seqlen_k`: the queries are the last tokens of the sequence, and none sees a key after itself.
///
/// Differentiable in `q`, `k` and `v`, with the selection of blocks held constant.
///
/// # Errors
/// [`Error::Torch`] names the argument, what was wanted and what was given.
pub fn moba_attention(q: &Tensor, k: &Tensor, v: &Tensor, config: &MobaConfig) -> Result<Tensor> {
    moba_attention_with_lse(q, k, v, config).map(|(out, _)| out)
}

/// [`moba_attention`] and `lse [batch, heads, seqlen_q]`, the natural logarithm of the sum of the exponentials of the
/// scaled scores: float32 (float64 for float64 inputs), differentiable, what merging attention over parts needs.
///
/// # Errors
/// As [`moba_attention`].
pub fn moba_attention_with_lse(q: &Tensor, k: &Tensor, v: &Tensor, config: &MobaConfig) -> Result<(Tensor, Tensor)> {
    if tracing::enabled!(tracing::Level::DEBUG) {
        select(q, k, v, config); // logs its answer
    }
    let arguments = [q.into(), k.into(), v.into(), config.block_size().into(), config.top_k().into()]
        .into_iter()
        .chain(options(config));
    pair("moba::attention", arguments)
}

/// Where the sequences of a packed batch begin and end.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// `[sequences + 1]` int32 on the device of `q`: sequence `i` holds the query tokens `[i]..[i + 1]`; first 0, last the
    /// number of tokens.
    pub cu_seqlens_q: &'a Tensor,
    /// The same for keys and values; no sequence may have fewer keys than queries.
    pub cu_seqlens_k: &'a Tensor,
    /// At least the longest query sequence.
    pub max_seqlen_q: i64,
    /// At least the longest key sequence.
    pub max_seqlen_k: i64,
}

/// MoBA attention over sequences packed without padding: `q [tokens_q, heads, head_dim]`, `k` and `v [tokens_k, heads_k,
/// head_dim]`; returns `out` shaped like `q` and `lse [heads, tokens_q]`. Blocks are cut from each sequence's own start.
/// Dtypes, heads, and in each sequence the place of the queries, are those of [`moba_attention`]; `lse` is that of
/// [`moba_attention_with_lse`].
///
/// # Errors
/// As [`moba_attention`], and for `cu_seqlens` that decrease or do not cover the tokens.
pub fn moba_attention_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    packed: &Packed<'_>,
    config: &MobaConfig,
) -> Result<(Tensor, Tensor)> {
    let arguments = [
        q.into(),
        k.into(),
        v.into(),
        packed.cu_seqlens_q.into(),
        packed.cu_seqlens_k.into(),
        packed.max_seqlen_q.into(),
        packed.max_seqlen_k.into(),
        config.block_size().into(),
        config.top_k().into(),
    ];
    pair("moba::attention_varlen", arguments.into_iter().chain(options(config)))
}

/// The blocks that each query selects (section 2.2, equations 5 and 6): int32 `[batch, heads, seqlen_q, top_k]`, the
/// current block first, then the others from the best gate score down, `-1` where fewer blocks exist. Not differentiable.
///
/// `q [batch, heads, seqlen_q, head_dim]` and `k [batch, heads_k, seqlen_k, head_dim]` as for [`moba_attention`].
///
/// # Errors
/// As [`moba_attention`].
pub fn route(q: &Tensor, k: &Tensor, config: &MobaConfig) -> Result<Tensor> {
    let arguments = [q.into(), k.into(), config.block_size().into(), config.top_k().into()];
    call("moba::route", &arguments)?.pop().ok_or_else(|| wrong_count("moba::route"))
}

/// Attention over a given routing: `route` int32 `[batch, heads, seqlen_q, slots]` with any number of slots, on the device
/// of `q`; `q`, `k`, `v` and what is returned as for [`moba_attention_with_lse`].
///
/// Entries below 0 or after the query's own block are ignored and duplicates count once. A query left without keys gets
/// output 0, lse -inf and zero gradients. `top_k` of `config` is not used.
///
/// # Errors
/// As [`moba_attention`].
pub fn routed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    route: &Tensor,
    config: &MobaConfig,
) -> Result<(Tensor, Tensor)> {
    let arguments = [q.into(), k.into(), v.into(), route.into(), config.block_size().into()];
    pair("moba::routed_attention", arguments.into_iter().chain(options(config)))
}

fn options<'a>(config: &MobaConfig) -> [Value<'a>; 2] {
    [config.softmax_scale().into(), config.deterministic().into()]
}

fn pair<'a>(op: &str, arguments: impl Iterator<Item = Value<'a>>) -> Result<(Tensor, Tensor)> {
    let outputs = call(op, &arguments.collect::<Vec<_>>())?;
    let [out, lse] = <[Tensor; 2]>::try_from(outputs).map_err(|_| wrong_count(op))?;
    Ok((out, lse))
}

fn wrong_count(op: &str) -> Error {
    Error::Torch { op: op.to_owned(), message: "the loaded library returns another number of tensors".to_owned() }
}
