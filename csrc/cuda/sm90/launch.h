// The forward stages for Hopper (sm_90a): the same lists and results as the portable ones, with partial outputs in the
// dtype of q. See docs/kernels.md.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// Whether these stages take the call: bf16 or f16, head_dim 64 or 128, block_size a multiple of 16, rows that start at
// 16 bytes, fewer than 2^31 list entries a head, a positive scale, and a Hopper GPU with code for it in this build.
bool accepts(const Shape& shape, const Source& q, const Source& k, const Source& v, double softmax_scale, Dtype dtype);

// AttendParams::partial_out has the dtype of q, partial_lse is float.
cudaError_t launch_attend(const AttendParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_merge(const AttendParams& attend, const Target& out, const Target& lse, Dtype dtype,
                         cudaStream_t stream);

}  // namespace moba::cuda::sm90
