// The backward pass for Hopper (sm_90a). See docs/kernels.md.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/params.h"

namespace moba::cuda::sm90 {

struct BackwardParams {
  Shape shape;
  PastLists lists;  // of the key heads to work on: dk and dv of these and dq of their query heads are written
  Source q, k, v, out, dout;
  Source lse, dlse;  // float
  double softmax_scale;
  Target dq, dk, dv;
};

// How a call is cut: fixed by the shape and the device.
struct BackwardPlan {
  bool reduce;         // dq is summed in memory as it comes, in no fixed order; otherwise by the lists, in order
  int64_t pass_tiles;  // without `reduce`: key tiles of a block whose partial dq are in memory at a time
  int64_t bytes;       // of workspace, aligned to 256
};

// For `units_k` key heads at a time. `bytes` is what partial dq may take, if one key tile of a block fits.
cudaError_t plan_backward(BackwardPlan& plan, const Shape& shape, int64_t units_k, bool deterministic, int64_t bytes);

cudaError_t launch_backward(const BackwardParams& params, const BackwardPlan& plan, void* workspace, Dtype dtype,
                            cudaStream_t stream);

}  // namespace moba::cuda::sm90
