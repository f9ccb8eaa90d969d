// Every check of a tensor argument, shared by all backends and by shape inference. Each message names the argument,
// what was wanted and what was given. Sizes are symbolic so that export with dynamic shapes stays dynamic.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <optional>

namespace moba {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

inline void check_block_size(int64_t block_size) {
  TORCH_CHECK_VALUE(block_size >= 1, "block_size: wanted at least 1, got ", block_size);
}

inline void check_top_k(int64_t top_k) {
  TORCH_CHECK_VALUE(top_k >= 1, "top_k: wanted at least 1 (the current block counts as one), got ", top_k);
}

// `layout` describes the wanted dimensions, for the message.
inline void check_rank(const Tensor& tensor, const char* name, int64_t wanted, const char* layout) {
  TORCH_CHECK_VALUE(tensor.dim() == wanted, name, ": wanted ", wanted, " dimensions ", layout, ", got ", tensor.dim(),
                    " dimensions ", tensor.sym_sizes());
}

inline void check_q_rank(const Tensor& q, bool packed) {
  packed ? check_rank(q, "q", 3, "[tokens_q, heads, head_dim]")
         : check_rank(q, "q", 4, "[batch, heads, seqlen_q, head_dim]");
}

inline void check_kv_rank(const Tensor& tensor, const char* name, bool packed) {
  packed ? check_rank(tensor, name, 3, "[tokens_k, heads_k, head_dim]")
         : check_rank(tensor, name, 4, "[batch, heads_k, seqlen_k, head_dim]");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, ": wanted device ", like.device(), " as ", like_name,
                    ", got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, ": wanted dtype ", like.scalar_type(), " as ",
                   like_name, ", got ", tensor.scalar_type());
}

// `wanted` is the full shape that the other arguments imply.
inline void check_shape(const Tensor& tensor, const char* name, c10::SymIntArrayRef wanted, const char* why) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == wanted, name, ": wanted shape ", wanted, " ", why, ", got ",
                    tensor.sym_sizes());
}

inline void check_int32(const Tensor& tensor, const char* name, const Tensor& q) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, name, ": wanted dtype Int (int32), got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == q.device(), name, ": wanted device ", q.device(), " as q, got ",
                    tensor.device());
}

inline void check_qk(const Tensor& q, const Tensor& k, bool packed) {
  check_q_rank(q, packed);
  check_kv_rank(k, "k", packed);
  const auto dtype = q.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "q: wanted dtype Float, Double, BFloat16 or Half, got ", dtype);
  check_like(k, "k", q, "q");
  const SymInt head_dim = q.sym_size(-1);
  TORCH_CHECK_VALUE(head_dim >= 1, "q: wanted head_dim of at least 1, got ", head_dim);
  TORCH_CHECK_VALUE(k.sym_size(-1) == head_dim, "k: wanted head_dim ", head_dim, " as q, got ", k.sym_size(-1));
  const SymInt heads = q.sym_size(1), heads_k = k.sym_size(1);
  TORCH_CHECK_VALUE(heads_k >= 1, "k: wanted at least 1 head, got ", heads_k);
  TORCH_CHECK_VALUE(heads >= 1 && heads % heads_k == 0, "q: wanted heads to be a positive multiple of the ", heads_k,
                    " heads of k, got ", heads, " heads");
  if (packed) return;
  TORCH_CHECK_VALUE(k.sym_size(0) == q.sym_size(0), "k: wanted batch ", q.sym_size(0), " as q, got ", k.sym_size(0));
  TORCH_CHECK_VALUE(q.sym_size(2) <= k.sym_size(2),
                    "q: wanted seqlen_q of at most seqlen_k (queries stand at the end of the keys), got seqlen_q ",
                    q.sym_size(2), " and seqlen_k ", k.sym_size(2));
}

inline void check_cu_seqlens_shape(const Tensor& q, const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k) {
  TORCH_CHECK_VALUE(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                    "cu_seqlens: wanted cu_seqlens_q and cu_seqlens_k both or neither, got only ",
                    cu_seqlens_q.has_value() ? "cu_seqlens_q" : "cu_seqlens_k");
  if (!cu_seqlens_q.has_value()) return;
  const std::pair<const char*, const Tensor&> both[] = {{"cu_seqlens_q", *cu_seqlens_q},
                                                        {"cu_seqlens_k", *cu_seqlens_k}};
  for (const auto& [name, cu_seqlens] : both) {
    check_int32(cu_seqlens, name, q);
    TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.sym_size(0) >= 1, name,
                      ": wanted shape [sequences + 1], got ", cu_seqlens.sym_sizes());
  }
  TORCH_CHECK_VALUE(cu_seqlens_q->sym_size(0) == cu_seqlens_k->sym_size(0), "cu_seqlens_k: wanted ",
                    cu_seqlens_q->sym_size(0), " entries as cu_seqlens_q, got ", cu_seqlens_k->sym_size(0));
}

// The values of cu_seqlens, both on the CPU, contiguous, int32 and of equal length.
inline void check_cu_seqlens(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t tokens_q, int64_t tokens_k,
                             int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const struct {
    const char* name;
    const char* max_name;
    const int32_t* cu;
    int64_t tokens, max_seqlen;
  } sides[] = {
      {"cu_seqlens_q", "max_seqlen_q", cu_seqlens_q.const_data_ptr<int32_t>(), tokens_q, max_seqlen_q},
      {"cu_seqlens_k", "max_seqlen_k", cu_seqlens_k.const_data_ptr<int32_t>(), tokens_k, max_seqlen_k},
  };
  const int64_t sequences = cu_seqlens_q.numel() - 1;
  for (const auto& side : sides) {
    TORCH_CHECK_VALUE(side.cu[0] == 0, side.name, ": wanted a first entry of 0, got ", side.cu[0]);
    for (int64_t i = 0; i < sequences; ++i) {
      TORCH_CHECK_VALUE(side.cu[i] <= side.cu[i + 1], side.name, ": wanted non-decreasing entries, got ", side.cu[i],
                        " then ", side.cu[i + 1], " at entry ", i + 1);
      TORCH_CHECK_VALUE(side.cu[i + 1] - side.cu[i] <= side.max_seqlen, side.max_name,
                        ": wanted at least the longest sequence, got ", side.max_seqlen, " for sequence ", i, " of ",
                        side.cu[i + 1] - side.cu[i], " tokens");
    }
    TORCH_CHECK_VALUE(side.cu[sequences] == side.tokens, side.name, ": wanted a last entry of ", side.tokens,
                      " (the number of tokens), got ", side.cu[sequences]);
  }
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length_q = sides[0].cu[i + 1] - sides[0].cu[i], length_k = sides[1].cu[i + 1] - sides[1].cu[i];
    TORCH_CHECK_VALUE(length_q <= length_k,
                      "cu_seqlens_q: wanted at most as many queries as keys in each sequence, got ", length_q,
                      " queries and ", length_k, " keys in sequence ", i);
  }
}

// Arguments of _route.
inline void check_route(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                        const OptionalTensor& cu_seqlens_k, int64_t block_size, const SymInt& slots) {
  check_block_size(block_size);
  TORCH_CHECK_VALUE(slots >= 1, "slots: wanted at least 1, got ", slots);
  check_qk(q, k, cu_seqlens_q.has_value() || cu_seqlens_k.has_value());
  check_cu_seqlens_shape(q, cu_seqlens_q, cu_seqlens_k);
}

// A routing from the user. (That of _attend may have no slots: attention to the current block alone.)
inline void check_route_slots(const Tensor& route) {
  TORCH_CHECK_VALUE(route.dim() == 4 && route.sym_size(-1) >= 1,
                    "route: wanted 4 dimensions [batch, heads, seqlen_q, slots] with at least 1 slot, got ",
                    route.sym_sizes());
}

// Arguments of _attend.
inline void check_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t block_size,
                         double softmax_scale) {
  const bool packed = cu_seqlens_q.has_value() || cu_seqlens_k.has_value();
  check_block_size(block_size);
  TORCH_CHECK_VALUE(std::isfinite(softmax_scale), "softmax_scale: wanted a finite number, got ", softmax_scale);
  check_qk(q, k, packed);
  check_kv_rank(v, "v", packed);
  check_like(v, "v", q, "q");
  check_shape(v, "v", k.sym_sizes(), "as k");
  check_cu_seqlens_shape(q, cu_seqlens_q, cu_seqlens_k);
  check_int32(route, "route", q);
  const int64_t rank = packed ? 3 : 4;
  TORCH_CHECK_VALUE(route.dim() == rank, "route: wanted ", rank, " dimensions ",
                    packed ? "[heads, tokens_q, slots]" : "[batch, heads, seqlen_q, slots]", ", got ",
                    route.sym_sizes());
  const SymInt slots = route.sym_size(-1);
  if (packed) {
    check_shape(route, "route", {q.sym_size(1), q.sym_size(0), slots}, "to match q");
  } else {
    check_shape(route, "route", {q.sym_size(0), q.sym_size(1), q.sym_size(2), slots}, "to match q");
  }
}

// Arguments of _attend_backward beyond those of _attend.
inline void check_backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& out,
                           const Tensor& lse, bool packed) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"dout", dout}, {"out", out}}) {
    check_like(tensor, name, q, "q");
    check_shape(tensor, name, q.sym_sizes(), "as q");
  }
  const auto wanted = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"dlse", dlse}, {"lse", lse}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == wanted, name, ": wanted dtype ", wanted, ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == q.device(), name, ": wanted device ", q.device(), " as q, got ",
                      tensor.device());
    if (packed) {
      check_shape(tensor, name, {q.sym_size(1), q.sym_size(0)}, "to match q");
    } else {
      check_shape(tensor, name, {q.sym_size(0), q.sym_size(1), q.sym_size(2)}, "to match q");
    }
  }
}

// Kernels read whole rows: the last dimension must be contiguous, all other strides are free.
inline bool has_contiguous_rows(const Tensor& tensor) { return tensor.sym_stride(-1) == 1 || tensor.sym_size(-1) == 1; }
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  return has_contiguous_rows(tensor) ? tensor : tensor.contiguous();
}

// Memory for a result: with contiguous rows too, and the order of the dimensions of `tensor` where that has them.
// (Where rows overlap, empty_like goes by sizes, and the last dimension may end up elsewhere.)
inline Tensor empty_rows_like(const Tensor& tensor) {
  const Tensor result = at::empty_like(tensor);
  return has_contiguous_rows(result) ? result : at::empty_like(tensor, tensor.options(), at::MemoryFormat::Contiguous);
}

}  // namespace moba
