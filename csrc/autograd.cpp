// Gradients of _attend. The routing is a constant: nothing flows through gate scores or block means.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "operators.h"

namespace moba {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

OptionalTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct Attend : torch::autograd::Function<Attend> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& route, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q,
                               const SymInt& max_seqlen_k, int64_t block_size, double softmax_scale,
                               bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, lse] = call_attend(q, k, v, route, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
                                  softmax_scale, deterministic);
    ctx->save_for_backward({q, k, v, out, lse, route, or_undefined(cu_seqlens_q), or_undefined(cu_seqlens_k)});
    ctx->saved_data["max_seqlen_q"] = max_seqlen_q;
    ctx->saved_data["max_seqlen_k"] = max_seqlen_k;
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["softmax_scale"] = softmax_scale;
    ctx->saved_data["deterministic"] = deterministic;
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    auto [dq, dk, dv] = call_attend_backward(
        grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], or_none(saved[6]),
        or_none(saved[7]), data["max_seqlen_q"].toSymInt(), data["max_seqlen_k"].toSymInt(), data["block_size"].toInt(),
        data["softmax_scale"].toDouble(), data["deterministic"].toBool());
    return {dq, dk, dv, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

// Only here so that a second derivative is an error and not a wrong number.
struct AttendBackward : torch::autograd::Function<AttendBackward> {
  static variable_list forward(AutogradContext*, const Tensor& dout, const Tensor& dlse, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                               const Tensor& route, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q,
                               const SymInt& max_seqlen_k, int64_t block_size, double softmax_scale,
                               bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dq, dk, dv] = call_attend_backward(dout, dlse, q, k, v, out, lse, route, cu_seqlens_q, cu_seqlens_k,
                                             max_seqlen_q, max_seqlen_k, block_size, softmax_scale, deterministic);
    return {dq, dk, dv};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "moba attention has no second derivative: wanted a first-order gradient, got a "
                                "backward pass through its backward pass (create_graph=True)");
  }
};

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                                  const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                  SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t block_size, double softmax_scale,
                                  bool deterministic) {
  // Nobody asks for gradients: no node.
  const auto has_tangent = [](const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); };
  if (!torch::autograd::compute_requires_grad(q, k, v) && !has_tangent(q) && !has_tangent(k) && !has_tangent(v)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_attend(q, k, v, route, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
                       softmax_scale, deterministic);
  }
  auto results = Attend::apply(q, k, v, route, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
                               softmax_scale, deterministic);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(
    const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& route, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t block_size, double softmax_scale, bool deterministic) {
  auto results = AttendBackward::apply(dout, dlse, q, k, v, out, lse, route, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                       max_seqlen_k, block_size, softmax_scale, deterministic);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, Autograd, m) {
  m.impl("_route", torch::CppFunction::makeFallthrough());
  m.impl("_attend", &attend);
  m.impl("_attend_backward", &attend_backward);
}

}  // namespace moba
