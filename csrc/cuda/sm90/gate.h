// The gate kernels as the host sees them: each pair of dtype and head_dim is compiled in a file of its own.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// Tiles of neighbouring rows of one unit, which never cross a sequence. Tile numbers leave room for the tiles of all
// sequences; a CTA takes every gridDim.x-th, from the end of the units on, where rows have the most blocks before them.
struct GateSchedule {
  int units, unit_tiles;
  int heads, heads_k, heads_per_key_head, blocks;  // of the shape, in 32 bits
};

// kKept: see GatePlan.
template <class T, int kHeadDim, int kKept>
struct Gate {
  // Whether this build has the code, which exists for sm_90a only.
  static bool built();
  static cudaError_t launch(const GateParams& p, const CUtensorMap& map_q, const CUtensorMap& map_means,
                            unsigned max_grid, cudaStream_t stream);
};

}  // namespace moba::cuda::sm90
