// The routing stages for Hopper (sm_90a): the same rows as the portable ones, from tensor cores. See docs/kernels.md.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// With one slot there is nothing to choose: launch_gate_topk reads neither q nor the means then.
cudaError_t launch_block_means(const MeansParams& params, Dtype dtype, cudaStream_t stream);
// GateParams::candidates is not used; all units are expected in one call. The means are read in boxes of 128 rows,
// which may hold blocks that were never written, but never beyond the array.
cudaError_t launch_gate_topk(const GateParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace moba::cuda::sm90
