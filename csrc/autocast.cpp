// Under autocast the public operators take q, k and v in the autocast dtype, as libtorch's own attention does.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "check.h"

namespace moba {
namespace {

Tensor to_autocast(const Tensor& tensor, c10::DeviceType device) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

// Casts every floating-point tensor on the stack; route and cu_seqlens are int32 and stay.
template <c10::DeviceType device>
void cast_and_call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard once(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().is_floating_point()) value = to_autocast(value.toTensor(), device);
  }
  op.callBoxed(stack);
}

template <c10::DeviceType device>
void register_for(torch::Library& m) {
  for (const char* name : {"route", "attention", "attention_varlen", "routed_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast_and_call<device>>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, AutocastCPU, m) { register_for<c10::kCPU>(m); }
TORCH_LIBRARY_IMPL(moba, AutocastCUDA, m) { register_for<c10::kCUDA>(m); }

}  // namespace moba
