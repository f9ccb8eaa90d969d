// One launch function per stage. They enqueue on `stream`, never synchronise, and expect rows, keys, slots and ranges
// that are not empty.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace moba::cuda {

// Routing: block means -> gate and top-k.
cudaError_t launch_block_means(const MeansParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_gate_topk(const GateParams& params, Dtype dtype, cudaStream_t stream);

// Forward: routing lists -> attention per key block over gathered queries -> merge by lse.
cudaError_t launch_lists(const ListsParams& params, cudaStream_t stream);
cudaError_t launch_attend(const AttendParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_merge(const MergeParams& params, Dtype dtype, cudaStream_t stream);

// Backward: delta, then dk and dv per key block, and dq per list entry followed by a sum over the entries of each row.
cudaError_t launch_delta(const DeltaParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_backward_keys(const BackwardKeysParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_backward_queries(const BackwardQueriesParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_sum_queries(const BackwardQueriesParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace moba::cuda
