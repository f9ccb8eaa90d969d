// Which tiles of queries a share has. Called by whole warps.
#pragma once

#include <cstdint>

#include "cuda/sm90/past/past.h"
#include "cuda/sm90/sequences.cuh"

namespace moba::cuda::sm90 {

// The tables of one key head, which is the `local`-th of the launch.
struct UnitLists {
  const int32_t* tile_begin;
  const int32_t* list_begin;
  int blocks;

  __device__ __forceinline__ UnitLists(const PastParams& p, const Schedule& schedule, int local)
      : blocks(schedule.blocks) {
    const int64_t offset = static_cast<int64_t>(local) * (blocks + 1);
    tile_begin = p.lists.tile_begin + offset;
    list_begin = p.lists.list_begin + offset;
  }
  __device__ __forceinline__ int tiles() const { return __ldg(tile_begin + blocks); }
  __device__ __forceinline__ int tile(int block) const { return __ldg(tile_begin + block); }
  __device__ __forceinline__ int entry(int block) const { return __ldg(list_begin + block); }

  // The block whose list holds `tile`, which exists. The warp looks at 32 blocks at a time.
  __device__ __forceinline__ int block_of(int tile) const {
    int low = 0, high = blocks;  // the tables' entries at low <= tile < those at high
    while (high - low > 1) {
      const int step = (high - low + 31) / 32, probe = low + step * (static_cast<int>(threadIdx.x % 32) + 1);
      const bool before = probe < high && this->tile(probe) <= tile;
      low += step * __popc(__ballot_sync(0xffffffffu, before));
      high = min(high, low + step);
    }
    return low;
  }
};

// Where a share may begin: every list has a multiple of kTogether tiles, and is cut at multiples only.
template <int kTogether>
__device__ __forceinline__ int cut(int tile) {
  return (tile + kTogether - 1) / kTogether * kTogether;
}

// Calls f(local unit, lists, first tile, end tile) for the tiles of a share, of which there are schedule.shares(): see
// Schedule.
template <int kTogether, class F>
__device__ __forceinline__ void for_each_part(const PastParams& p, const Schedule& schedule, int share, F f) {
  const int turn = share / schedule.pass_shares, number = share % schedule.pass_shares;
  const int pass = min(turn, schedule.passes - 1), level = turn - pass;
  const int units = static_cast<int>(p.lists.units_k.count), first = pass * schedule.pass_units;
  const int end = min(first + schedule.pass_units, units);
  int total = 0;
#pragma unroll 4
  for (int local = first; local < end; ++local) total += UnitLists(p, schedule, local).tiles();
  const int levels = pass + 1 < schedule.passes ? 1 : schedule.last_levels;
  const int begin_level = total - (total >> level),
            end_level = level + 1 < levels ? total - (total >> (level + 1)) : total;
  const int each = (end_level - begin_level) / schedule.pass_shares;
  const int more = (end_level - begin_level) % schedule.pass_shares;
  int from = begin_level + number * each + min(number, more), to = from + each + (number < more);
  for (int local = first; local < end && to > 0; ++local) {
    const UnitLists lists(p, schedule, local);
    const int tiles = lists.tiles();
    if (from < tiles && from < to) {
      const int begin = cut<kTogether>(max(from, 0)), after = cut<kTogether>(min(to, tiles));
      if (begin < after) f(local, lists, begin, after);
    }
    from -= tiles;
    to -= tiles;
  }
}

// The tiles of one block within a share.
struct Item {
  int block;
  int first_entry, list_end;  // in the entries of the key head
  int tiles;
};

// Calls f(item) for each block that has tiles in [tile, end) of a key head.
template <class F>
__device__ __forceinline__ void for_each_item(const UnitLists& lists, int tile, int end, F f) {
  int block = -1;
  while (tile < end) {
    // Mostly the next one; after lists without entries it is searched for.
    ++block;
    if (block == 0 || lists.tile(block + 1) <= tile) block = lists.block_of(tile);
    const int after = min(lists.tile(block + 1), end);
    f(Item{block, lists.entry(block) + (tile - lists.tile(block)) * kRows, lists.entry(block + 1), after - tile});
    tile = after;
  }
}

}  // namespace moba::cuda::sm90
