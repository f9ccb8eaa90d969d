// Which tiles of queries a CTA works on: a static share, longest first.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/current/current.h"
#include "cuda/sm90/current/plan.h"

namespace moba::cuda::sm90::current {

// Calls f(unit, tile of the unit) for the share of this CTA; packed: also for tiles that do not exist.
//
// All CTAs work on `together` segments at a time, so that those of the same block find its keys in the L2 cache. The
// tiles of these segments are dealt by falling cost, which is where they stand in their block, and in alternating
// direction, so that all shares cost about the same. Or, `in_order`, all tiles one after the other, as partial results
// of neighbouring rows lie side by side; the places of the tiles in their segments are turned from round to round, so
// that each CTA has long ones and short ones.
template <class F>
__device__ __forceinline__ void for_each_share(const Schedule& schedule, F f) {
  const int ctas = static_cast<int>(gridDim.x), all = schedule.units * schedule.segments;
  int own = static_cast<int>(blockIdx.x);
  for (int first = 0; first < all; first += schedule.together) {
    const int segments = min(schedule.together, all - first), items = segments * schedule.span;
    for (int begin = 0; begin < items; begin += ctas) {
      const int item = begin + own;
      if (item < items) {
        int segment = first + item % segments, number = schedule.span - 1 - item / segments;
        if (schedule.in_order) {
          segment = item / schedule.span;
          number = (item + segment * schedule.span / ctas) % schedule.span;
        }
        const int tile = segment % schedule.segments * schedule.span + number;
        if (tile < schedule.tiles) f(schedule.unit_begin + segment / schedule.segments, tile);
      }
      if (!schedule.in_order) own = ctas - 1 - own;
    }
  }
}

template <class P>
__device__ __forceinline__ Tile tile_at(const Shape& shape, const Schedule& schedule, int unit, int number) {
  constexpr int kTileRows = P::kTileRows;
  Tile tile;
  tile.unit = unit;
  if (shape.cu_seqlens_q == nullptr) {
    tile.row = number * kTileRows;
    tile.rows = min(kTileRows, schedule.rows - tile.row);
    tile.position = schedule.keys - schedule.rows + tile.row;
    tile.key_begin = 0;
  } else {
    const Sequence sequence = sequence_of_part(shape, shape.cu_seqlens_q, shape.rows, number, kTileRows);
    const int row_begin = static_cast<int>(sequence.row_begin), rows = static_cast<int>(sequence.rows);
    const int first = (number - row_begin / kTileRows - static_cast<int>(sequence.index)) * kTileRows;
    tile.row = row_begin + first;
    tile.rows = min(kTileRows, rows - first);
    tile.position = static_cast<int>(sequence.keys) - rows + first;
    tile.key_begin = static_cast<int>(sequence.key_begin);
  }
  tile.key = max(tile.position, 0) / schedule.block_size * schedule.block_size;
  tile.steps = max(tile.position + tile.rows - 1 - tile.key, 0) / kKeys + 1;
  // Sequences longer than max_seqlen, which a captured graph does not check.
  if (P::kMasked) tile.steps = min(tile.steps, kMaskedSteps);
  return tile;
}

// Calls f(tile) for the tiles of this CTA, which hold at least one row each. P: the plan.
template <class P, class F>
__device__ __forceinline__ void for_each_tile(const Shape& shape, const Schedule& schedule, F f) {
  for_each_share(schedule, [&](int unit, int number) {
    const Tile tile = tile_at<P>(shape, schedule, unit, number);
    if (tile.rows > 0) f(tile);
  });
}

// The key tiles that a tile goes through, from the last to the first.
template <bool kMasked>
struct KeyTiles {
  int key, last;  // of the present one, and where to end

  __device__ __forceinline__ explicit KeyTiles(const Tile& tile)
      : key(tile.key + (tile.steps - 1) * kKeys), last(tile.key) {}
  __device__ __forceinline__ bool more() const { return key > last; }
  __device__ __forceinline__ void next() { key -= kKeys; }
  __device__ __forceinline__ bool at_least(int count) const { return (key - last) / kKeys + 1 >= count; }
};
template <>
struct KeyTiles<true> {
  int key;
  uint64_t left;

  __device__ __forceinline__ explicit KeyTiles(uint64_t chosen) : left(chosen) { next(); }
  __device__ __forceinline__ bool more() const { return left != 0; }
  __device__ __forceinline__ void next() {
    const int step = 63 - __clzll(static_cast<long long>(left));
    left ^= uint64_t(1) << step;
    key = step * kKeys;
  }
  __device__ __forceinline__ bool at_least(int count) const { return __popcll(left) + 1 >= count; }
};

}  // namespace moba::cuda::sm90::current
