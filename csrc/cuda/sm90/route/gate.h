// The gate kernels as the host sees them: each pair of dtype and head_dim is compiled in a file of its own.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// Division of numbers below 2^31 by one that is known on the host.
struct Divisor {
  uint32_t divisor, factor, shift;

  explicit Divisor(int64_t by) : divisor(static_cast<uint32_t>(by)), factor(0), shift(0) {
    while ((int64_t(1) << shift) < by) ++shift;
    if (by > 1) factor = static_cast<uint32_t>(((uint64_t(1) << (31 + shift)) + divisor - 1) / divisor);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int number) const {
    return divisor == 1 ? number : static_cast<int>(__umulhi(static_cast<uint32_t>(number), factor) >> (shift - 1));
  }
#endif
};

// Tiles of neighbouring rows of one unit, which never cross a sequence. Tile numbers leave room for the tiles of all
// sequences; a CTA takes every gridDim.x-th, from the end of the units on, where rows have the most blocks before them.
struct GateSchedule {
  int unit_tiles, tiles;
  int blocks;  // of the shape
  Divisor units, heads, heads_per_key_head, block_size;
};

// kKept: see GatePlan.
template <class T, int kHeadDim, int kKept>
struct Gate {
  static cudaError_t launch(const GateParams& p, const CUtensorMap& map_q, const CUtensorMap& map_means,
                            unsigned max_grid, cudaStream_t stream);
};

}  // namespace moba::cuda::sm90
