// Lists and attention to past blocks, between routing (route/route.h) and the current block (current/current.h): see
// docs/kernels.md.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/params.h"

namespace moba::cuda::sm90 {

// PastLists::chunks for this shape.
int64_t list_chunks(const Shape& shape);

cudaError_t launch_past_lists(const PastListsParams& params, cudaStream_t stream);
cudaError_t launch_past(const PastParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace moba::cuda::sm90
