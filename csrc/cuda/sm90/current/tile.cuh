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
// direction, so that all shares cost about the same.
template <class F>
__device__ __forceinline__ void for_each_share(const Schedule& schedule, F f) {
  const int ctas = static_cast<int>(gridDim.x), all = schedule.units * schedule.segments;
  int own = static_cast<int>(blockIdx.x);
  for (int first = 0; first < all; first += schedule.together) {
    const int segments = min(schedule.together, all - first), items = segments * schedule.span;
    for (int begin = 0; begin < items; begin += ctas) {
      const int item = begin + own;
      if (item < items) {
        const int segment = first + item % segments, number = schedule.span - 1 - item / segments;
        const int tile = segment % schedule.segments * schedule.span + number;
        if (tile < schedule.tiles) f(schedule.unit_begin + segment / schedule.segments, tile);
      }
      own = ctas - 1 - own;
    }
  }
}

template <int kTileRows>
__device__ __forceinline__ Tile tile_at(const Shape& shape, const Schedule& schedule, int unit, int number) {
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
  return tile;
}

// Calls f(tile) for the tiles of this CTA, which hold at least one row each.
template <int kTileRows, class F>
__device__ __forceinline__ void for_each_tile(const Shape& shape, const Schedule& schedule, F f) {
  for_each_share(schedule, [&](int unit, int number) {
    const Tile tile = tile_at<kTileRows>(shape, schedule, unit, number);
    if (tile.rows > 0) f(tile);
  });
}

}  // namespace moba::cuda::sm90::current
