// The public operators, each a composition of the internal ones: choose blocks, then attend to them. Autograd,
// backends and shape inference only ever see the internal operators.
#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "schema.h"

namespace moba {
namespace {

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

double scale_or_default(std::optional<double> softmax_scale, const Tensor& q) {
  if (softmax_scale.has_value()) return *softmax_scale;
  return 1.0 / std::sqrt(static_cast<double>(q.sym_size(-1).guard_int(__FILE__, __LINE__)));
}

// No query can select more blocks than the longest sequence has.
SymInt clamped_slots(const SymInt& seqlen_k, int64_t block_size, int64_t top_k) {
  const SymInt blocks = (seqlen_k - 1) / block_size + 1;
  return blocks.max(1).min(top_k);
}

// A routing without slots: every query attends to its current block and no other.
Tensor no_route(const Tensor& q) {
  const auto options = q.options().dtype(at::kInt);
  if (q.dim() == 3) return at::empty_symint({q.sym_size(1), q.sym_size(0), 0}, options);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), 0}, options);
}

// Attention over blocks that the gate chooses. Where all are chosen, that is causal attention over one block as long as
// the sequence. (A symbolic length is not asked: it would bind an exported program to this one.)
std::tuple<Tensor, Tensor> choose_and_attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                             const SymInt& seqlen_q, const SymInt& seqlen_k, int64_t block_size,
                                             int64_t top_k, std::optional<double> softmax_scale, bool deterministic) {
  const double scale = scale_or_default(softmax_scale, q);
  const auto length = seqlen_k.maybe_as_int();
  // On the CPU many blocks are as fast as one.
  const bool all = q.is_cuda() && length.has_value() && *length > 0 && (*length - 1) / block_size < top_k;
  Tensor chosen;
  if (all || (q.is_cuda() && top_k == 1)) {
    chosen = no_route(q);
  } else {
    chosen = call_route(q, k, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, block_size,
                        clamped_slots(seqlen_k, block_size, top_k));
  }
  // Rounded up, as kernels want multiples of 16; a GPU takes fewer tokens than this limit.
  const int64_t attended = all ? (std::min(*length, int64_t(1) << 31) + 15) / 16 * 16 : block_size;
  return call_attend(q, k, v, chosen, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, attended, scale, deterministic);
}

Tensor route(const Tensor& q, const Tensor& k, int64_t block_size, int64_t top_k) {
  check_block_size(block_size);
  check_top_k(top_k);
  check_qk(q, k, /*packed=*/false);
  return call_route(q, k, {}, {}, q.sym_size(2), k.sym_size(2), block_size, top_k);
}

std::tuple<Tensor, Tensor> routed_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                                            int64_t block_size, std::optional<double> softmax_scale,
                                            bool deterministic) {
  check_block_size(block_size);
  check_qk(q, k, /*packed=*/false);
  check_route_slots(route);
  return call_attend(q, k, v, route, {}, {}, q.sym_size(2), k.sym_size(2), block_size,
                     scale_or_default(softmax_scale, q), deterministic);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t block_size,
                                     int64_t top_k, std::optional<double> softmax_scale, bool deterministic) {
  check_block_size(block_size);
  check_top_k(top_k);
  check_qk(q, k, /*packed=*/false);
  return choose_and_attend(q, k, v, {}, {}, q.sym_size(2), k.sym_size(2), block_size, top_k, softmax_scale,
                           deterministic);
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, SymInt max_seqlen_q,
                                            SymInt max_seqlen_k, int64_t block_size, int64_t top_k,
                                            std::optional<double> softmax_scale, bool deterministic) {
  check_block_size(block_size);
  check_top_k(top_k);
  check_qk(q, k, /*packed=*/true);
  return choose_and_attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, top_k,
                           softmax_scale, deterministic);
}

}  // namespace

Tensor call_route(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q, const SymInt& max_seqlen_k,
                  int64_t block_size, const SymInt& slots) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, SymInt,
                                     SymInt, int64_t, SymInt)>("moba::_route");
  return op.call(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, slots);
}

Tensor with_slots(const Tensor& route, const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q, const SymInt& max_seqlen_k,
                  int64_t block_size) {
  if (route.size(-1) > 0) return route.contiguous();
  return call_route(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, 1);
}

std::tuple<Tensor, Tensor> call_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                                       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                       const SymInt& max_seqlen_q, const SymInt& max_seqlen_k, int64_t block_size,
                                       double softmax_scale, bool deterministic) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                      const OptionalTensor&, SymInt, SymInt, int64_t, double, bool)>("moba::_attend");
  return op.call(q, k, v, route, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, softmax_scale,
                 deterministic);
}

std::tuple<Tensor, Tensor, Tensor> call_attend_backward(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                                                        const Tensor& k, const Tensor& v, const Tensor& out,
                                                        const Tensor& lse, const Tensor& route,
                                                        const OptionalTensor& cu_seqlens_q,
                                                        const OptionalTensor& cu_seqlens_k, const SymInt& max_seqlen_q,
                                                        const SymInt& max_seqlen_k, int64_t block_size,
                                                        double softmax_scale, bool deterministic) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const OptionalTensor&, const OptionalTensor&, SymInt, SymInt, int64_t, double, bool)>(
      "moba::_attend_backward");
  return op.call(dout, dlse, q, k, v, out, lse, route, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                 block_size, softmax_scale, deterministic);
}

TORCH_LIBRARY_IMPL(moba, CompositeImplicitAutograd, m) {
  m.impl("route", &route);
  m.impl("attention", &attention);
  m.impl("attention_varlen", &attention_varlen);
  m.impl("routed_attention", &routed_attention);
}

}  // namespace moba
