// One view of dense and packed tensors: a list of sequences, and each head of a sequence as a matrix of rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../check.h"

namespace moba::cpu {

// A [rows, head_dim] matrix inside a larger tensor: the last dimension is contiguous, rows are `stride` apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// The rows of all query heads of a sequence.
template <typename T>
struct HeadRows {
  T* data;
  int64_t head_stride, row_stride;
  T* operator()(int64_t head, int64_t row) const { return data + head * head_stride + row * row_stride; }
};

// One sequence of the batch. Query i stands at position seqlen_k - seqlen_q + i.
struct Sequence {
  int64_t index;             // batch index, dense layout only
  int64_t begin_q, begin_k;  // first token, packed layout only
  int64_t seqlen_q, seqlen_k;
  int64_t first_block = 0, first_key = 0;  // blocks and keys of all sequences before this one
  int64_t position(int64_t query) const { return seqlen_k - seqlen_q + query; }
};

struct Problem {
  bool packed;
  int64_t heads, heads_k, head_dim, block_size;
  int64_t blocks = 0, keys = 0;  // of all sequences together
  std::vector<Sequence> sequences;

  int64_t group() const { return heads / heads_k; }
  int64_t blocks_of(const Sequence& sequence) const { return (sequence.seqlen_k + block_size - 1) / block_size; }

  // Head `head` of `sequence` in k, v or a tensor of the same layout.
  template <typename T>
  Rows<T> keys_of(const Tensor& tensor, const Sequence& sequence, int64_t head) const {
    T* data = static_cast<T*>(tensor.data_ptr()) + head * tensor.stride(1);
    if (packed) return {data + sequence.begin_k * tensor.stride(0), tensor.stride(0)};
    return {data + sequence.index * tensor.stride(0), tensor.stride(2)};
  }

  // All heads of `sequence` in q or a tensor of the same layout.
  template <typename T>
  HeadRows<T> queries_of(const Tensor& tensor, const Sequence& sequence) const {
    T* data = static_cast<T*>(tensor.data_ptr());
    if (packed) return {data + sequence.begin_q * tensor.stride(0), tensor.stride(1), tensor.stride(0)};
    return {data + sequence.index * tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }

  // The same in a contiguous [batch, heads, seqlen_q(, width)] or [heads, tokens_q(, width)] tensor: lse, dlse, route.
  template <typename T>
  HeadRows<T> per_query(const Tensor& tensor, const Sequence& sequence, int64_t width = 1) const {
    T* data = static_cast<T*>(tensor.data_ptr());
    if (packed) return {data + sequence.begin_q * width, tensor.size(1) * width, width};
    return {data + sequence.index * heads * sequence.seqlen_q * width, sequence.seqlen_q * width, width};
  }

  // The shape that `per_query` reads: that of q without head_dim, and `width` where it is given.
  std::vector<int64_t> per_query_shape(const Tensor& q, std::optional<int64_t> width = std::nullopt) const {
    std::vector<int64_t> shape =
        packed ? std::vector{q.size(1), q.size(0)} : std::vector{q.size(0), q.size(1), q.size(2)};
    if (width) shape.push_back(*width);
    return shape;
  }
};

inline Problem make_problem(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                            const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                            int64_t block_size) {
  Problem problem{.packed = cu_seqlens_q.has_value(),
                  .heads = q.size(1),
                  .heads_k = k.size(1),
                  .head_dim = q.size(-1),
                  // One block as long as all keys serves for any longer one.
                  .block_size = std::min(block_size, std::max<int64_t>(1, k.size(cu_seqlens_q.has_value() ? 0 : 2))),
                  .sequences = {}};
  const auto add = [&](Sequence sequence) {
    sequence.first_block = problem.blocks;
    sequence.first_key = problem.keys;
    problem.blocks += problem.blocks_of(sequence);
    problem.keys += sequence.seqlen_k;
    problem.sequences.push_back(sequence);
  };
  if (problem.packed) {
    const Tensor cu_q = cu_seqlens_q->contiguous(), cu_k = cu_seqlens_k->contiguous();
    check_cu_seqlens(cu_q, cu_k, q.size(0), k.size(0), max_seqlen_q, max_seqlen_k);
    const int32_t* begin_q = cu_q.const_data_ptr<int32_t>();
    const int32_t* begin_k = cu_k.const_data_ptr<int32_t>();
    for (int64_t i = 0; i + 1 < cu_q.numel(); ++i) {
      add({.index = i,
           .begin_q = begin_q[i],
           .begin_k = begin_k[i],
           .seqlen_q = begin_q[i + 1] - begin_q[i],
           .seqlen_k = begin_k[i + 1] - begin_k[i]});
    }
  } else {
    for (int64_t i = 0; i < q.size(0); ++i) {
      add({.index = i, .begin_q = 0, .begin_k = 0, .seqlen_q = q.size(2), .seqlen_k = k.size(2)});
    }
  }
  return problem;
}

// Runs body(sequence, head, row) for each query.
template <typename Body>
void for_each_query(const Problem& problem, const Body& body) {
  for (const Sequence& sequence : problem.sequences) {
    at::parallel_for(0, problem.heads * sequence.seqlen_q, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(sequence, i / sequence.seqlen_q, i % sequence.seqlen_q);
    });
  }
}

}  // namespace moba::cpu
