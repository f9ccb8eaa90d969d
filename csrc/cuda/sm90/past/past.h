// The past kernels as the host sees them: each pair of dtype and head_dim is compiled in a file of its own.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/params.h"

namespace moba::cuda::sm90 {

// Key heads are taken `pass_units` at a time by all CTAs together, so that what they share stays in the L2 cache. The
// tiles of a pass are cut into equal shares of consecutive tiles; CTAs take them in order, each the next one when it is
// done with its last: some are up to a quarter slower than others. What a tile's result is does not depend on who
// computes it. In the last pass shares get smaller, so that all end together: each of its levels takes half of the
// tiles that are left, the last one all. A pass has fewer than 2^31 tiles.
struct Schedule {
  int32_t* tickets;  // [2], zero before and after a launch: shares taken beyond one for each CTA, CTAs that found none
  int pass_units, passes;
  int pass_shares, last_levels;  // shares: of a pass or, in the last one, of a level
  int blocks, heads_k, group;    // of the shape, in 32 bits: registers are few in the kernel
  int steps;                     // key tiles of a block
  int last_keys;                 // keys of the last of them
  uint32_t row_bytes;            // of q

  constexpr int shares() const { return (passes - 1 + last_levels) * pass_shares; }
};

// Boxes of one panel of kKeys keys; last_v: of those that the last key tile of a block has.
struct KeyMaps {
  CUtensorMap k, v, last_v;
};

// kKeys, kResident: see Plan.
template <class T, int kHeadDim, int kKeys, bool kResident>
struct Past {
  static cudaError_t launch(const PastParams& p, const KeyMaps& maps, const Schedule& schedule, unsigned grid,
                            cudaStream_t stream);
};

}  // namespace moba::cuda::sm90
