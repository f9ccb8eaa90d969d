// Defines the operators. The anchor stands in the same translation unit, so a program that calls it cannot be linked
// without the registration.
#include <torch/library.h>

#include "schema.h"

#ifndef MOBA_WITH_CUDA
#include "check.h"
#endif

TORCH_LIBRARY(moba, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  for (const char* schema :
       {moba::kRouteSchema, moba::kAttentionSchema, moba::kAttentionVarlenSchema, moba::kRoutedAttentionSchema,
        moba::kInternalRouteSchema, moba::kAttendSchema, moba::kAttendBackwardSchema, moba::kHopperRefusalSchema}) {
    m.def(schema, tags);
  }
}

#ifdef MOBA_WITH_CUDA
extern "C" int moba_cuda_anchor();

extern "C" int moba_anchor() { return moba_cuda_anchor(); }
#else
namespace {

void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": wanted CPU tensors, got CUDA tensors. This library was "
                              "built without CUDA kernels; rebuild tch-moba with the feature `cuda`");
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  for (const char* name : {"_route", "_attend", "_attend_backward", "_hopper_refusal"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}

extern "C" int moba_anchor() { return 0; }
#endif
