// Shapes, dtypes and strides without data: FakeTensor, torch.compile, torch.export.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "check.h"

namespace moba {
namespace {

Tensor route(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
             SymInt, SymInt, int64_t block_size, SymInt slots) {
  check_route(q, k, cu_seqlens_q, cu_seqlens_k, block_size, slots);
  const auto options = q.options().dtype(at::kInt);
  if (cu_seqlens_q.has_value()) return at::empty_symint({q.sym_size(1), q.sym_size(0), slots}, options);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), slots}, options);
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                                  const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, SymInt,
                                  SymInt, int64_t block_size, double softmax_scale, bool) {
  check_attend(q, k, v, route, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  const auto options = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto shape = route.sym_sizes();
  return {empty_rows_like(q), at::empty_symint(shape.slice(0, shape.size() - 1), options)};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                                                   const Tensor& k, const Tensor& v, const Tensor& out,
                                                   const Tensor& lse, const Tensor& route,
                                                   const OptionalTensor& cu_seqlens_q,
                                                   const OptionalTensor& cu_seqlens_k, SymInt, SymInt,
                                                   int64_t block_size, double softmax_scale, bool) {
  check_attend(q, k, v, route, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  check_backward(dout, dlse, q, out, lse, cu_seqlens_q.has_value());
  return {empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)};
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, Meta, m) {
  m.impl("_route", &route);
  m.impl("_attend", &attend);
  m.impl("_attend_backward", &attend_backward);
}

}  // namespace moba
