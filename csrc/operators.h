// Typed handles of the internal operators, for calls that go through the dispatcher.
#pragma once

#include <tuple>

#include "check.h"

namespace moba {

Tensor call_route(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q, const SymInt& max_seqlen_k,
                  int64_t block_size, const SymInt& slots);

// The route of an _attend call, contiguous, for kernels that need the current block in a slot of its own.
Tensor with_slots(const Tensor& route, const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q, const SymInt& max_seqlen_k,
                  int64_t block_size);

std::tuple<Tensor, Tensor> call_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                                       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                       const SymInt& max_seqlen_q, const SymInt& max_seqlen_k, int64_t block_size,
                                       double softmax_scale, bool deterministic);

std::tuple<Tensor, Tensor, Tensor> call_attend_backward(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                                                        const Tensor& k, const Tensor& v, const Tensor& out,
                                                        const Tensor& lse, const Tensor& route,
                                                        const OptionalTensor& cu_seqlens_q,
                                                        const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q,
                                                        const SymInt& max_seqlen_k, int64_t block_size,
                                                        double softmax_scale, bool deterministic);

}  // namespace moba
