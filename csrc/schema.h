// The only place where a signature is written. libtorch checks the C++ kernels against these strings when the library
// loads, and every call from Rust, Python or TorchScript when it is made.
//
// Dense layout:  q [batch, heads, seqlen_q, head_dim], k v [batch, heads_k, seqlen_k, head_dim],
//                route [batch, heads, seqlen_q, slots] int32, lse [batch, heads, seqlen_q].
// Packed layout: q [tokens_q, heads, head_dim], k v [tokens_k, heads_k, head_dim], cu_seqlens [sequences + 1] int32,
//                route [heads, tokens_q, slots] int32, lse [heads, tokens_q].
#pragma once

namespace moba {

// Public operators.
constexpr const char* kRouteSchema = "route(Tensor q, Tensor k, int block_size, int top_k) -> Tensor";
constexpr const char* kAttentionSchema =
    "attention(Tensor q, Tensor k, Tensor v, int block_size, int top_k, *, float? softmax_scale=None, "
    "bool deterministic=False) -> (Tensor out, Tensor lse)";
constexpr const char* kAttentionVarlenSchema =
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, int block_size, int top_k, *, float? softmax_scale=None, bool deterministic=False) "
    "-> (Tensor out, Tensor lse)";
constexpr const char* kRoutedAttentionSchema =
    "routed_attention(Tensor q, Tensor k, Tensor v, Tensor route, int block_size, *, float? softmax_scale=None, "
    "bool deterministic=False) -> (Tensor out, Tensor lse)";

// What a backend implements. Dense when cu_seqlens_q and cu_seqlens_k are absent, packed when both are given.
constexpr const char* kInternalRouteSchema =
    "_route(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, int block_size, SymInt slots) -> Tensor";
constexpr const char* kAttendSchema =
    "_attend(Tensor q, Tensor k, Tensor v, Tensor route, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int block_size, float softmax_scale, bool deterministic) "
    "-> (Tensor out, Tensor lse)";
constexpr const char* kAttendBackwardSchema =
    "_attend_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor route, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int block_size, "
    "float softmax_scale, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)";

// Why the Hopper kernels do not take CUDA tensors, or nothing; dense layout.
constexpr const char* kHopperRefusalSchema =
    "_hopper_refusal(Tensor q, Tensor k, Tensor v, int block_size, float softmax_scale) -> str";

}  // namespace moba
