// The forward stages for Hopper (sm_90a), which take the place of the portable ones: see docs/kernels.md.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/params.h"

namespace moba::cuda::sm90 {

// Whether these stages take the call: bf16 or f16, head_dim 64 or 128, block_size a multiple of 16, rows that start at
// 16 bytes, at most 2^27 rows and 32 heads a key head, fewer than 2^31 list entries a key head, a positive scale, and a
// Hopper GPU with code for it in this build.
bool accepts(const Shape& shape, const Source& q, const Source& k, const Source& v, double softmax_scale, Dtype dtype);

// PastLists::chunks for this shape.
int64_t list_chunks(const Shape& shape);

cudaError_t launch_past_lists(const PastListsParams& params, cudaStream_t stream);
cudaError_t launch_past(const PastParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace moba::cuda::sm90
