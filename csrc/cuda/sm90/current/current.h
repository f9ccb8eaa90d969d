// Attention of every query to its current block, merged with the partial results of the past blocks: the last stage of
// the forward pass, and, where a block is the whole sequence, dense causal attention.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/current/plan.h"

namespace moba::cuda::sm90 {

// Takes what sm90::refusal lets pass, and any block_size. Where `lists.positions` is null, `partials` and the other
// lists are not read, and every row has its current block and no other or, with a route, the blocks that it chose; what
// can be attended to so is what query_major says. Rows without a visible key get 0 and minus infinity.
cudaError_t launch_current(const CurrentParams& params, Dtype dtype, cudaStream_t stream);

// Whether a call is attended to by queries, from a route and without lists: its sequences are so short that masked
// scores cost less than partial results. Wants blocks of whole key tiles, and sequences of as many as a word has bits.
// An estimate for one query, from what is the same in every batch that its sequence can be in.
bool query_major(const Shape& shape, int64_t max_seqlen_q, int64_t max_seqlen_k);

namespace current {

// Which tiles of queries a CTA works on, and when: see for_each_tile.
struct Schedule {
  int tiles;     // of a unit; packed: an upper bound
  int span;      // tiles of a segment: the queries of one block
  int segments;  // of a unit
  int together;  // segments that all CTAs work on at one time
  bool in_order;
  int unit_begin, units;
  int heads, heads_k, heads_per_key_head;
  int rows, keys, block_size, slots;
  // Mode::kMasked, where the schedule is that of one block as long as the sequence:
  int chosen_size;       // of the blocks that rows choose
  int chosen_steps;      // key tiles of such a block
  uint64_t chosen_bits;  // as many bits
};

template <class T, int kHeadDim, Mode kMode>
struct Current {
  static constexpr int kTileRows = Plan<kHeadDim, kMode>::kTileRows;
  static cudaError_t launch(const CurrentParams& p, const CUtensorMap& map_q, const CUtensorMap& map_k,
                            const CUtensorMap& map_v, const Schedule& schedule, unsigned grid, cudaStream_t stream);
};

}  // namespace current
}  // namespace moba::cuda::sm90
