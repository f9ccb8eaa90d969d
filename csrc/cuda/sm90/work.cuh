// Which tiles of queries a CTA works on: a static share, so that no order depends on time.
#pragma once

#include <cstdint>

#include "cuda/sm90/attend.h"

namespace moba::cuda::sm90 {

// The tables of one unit, which is the `local`-th of the launch.
struct UnitLists {
  const int64_t* tile_begin;
  const int64_t* list_begin;
  int blocks;

  __device__ __forceinline__ UnitLists(const AttendParams& p, const Schedule& schedule, int local)
      : blocks(schedule.blocks) {
    const int64_t offset = (p.units.begin - p.lists.units.begin + local) * (blocks + 1);
    tile_begin = p.lists.tile_begin + offset;
    list_begin = p.lists.list_begin + offset;
  }
  __device__ __forceinline__ int tiles() const { return static_cast<int>(__ldg(tile_begin + blocks)); }
  __device__ __forceinline__ int tile(int block) const { return static_cast<int>(__ldg(tile_begin + block)); }
  __device__ __forceinline__ int entry(int block) const { return static_cast<int>(__ldg(list_begin + block)); }
  // The block whose list holds `tile`, which exists.
  __device__ __forceinline__ int block_of(int tile) const {
    int low = 0, high = blocks - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (this->tile(middle) <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Calls f(local unit, first tile, end tile) for this CTA's share.
template <class F>
__device__ __forceinline__ void for_each_share(const AttendParams& p, const Schedule& schedule, F f) {
  const int units = static_cast<int>(p.units.count), shares = static_cast<int>(gridDim.x);
  int share = blockIdx.x;
  for (int first = 0; first < units; first += schedule.pass_units) {
    const int end = min(first + schedule.pass_units, units);
    int total = 0;
    for (int local = first; local < end; ++local) total += UnitLists(p, schedule, local).tiles();
    const int each = total / shares, more = total % shares;
    int from = share * each + min(share, more), to = from + each + (share < more);
    for (int local = first; local < end && to > 0; ++local) {
      const int tiles = UnitLists(p, schedule, local).tiles();
      if (from < tiles) f(local, max(from, 0), min(to, tiles));
      from -= tiles;
      to -= tiles;
    }
    share = (share + 41) % shares;
  }
}

// The tiles of one block within a share.
struct Item {
  int key_begin, keys;  // keys of the unit
  int shift;            // see Tile::shift
  int list_begin;       // the list's entries in the unit
  int list_end;
  int first, count;  // tiles, numbered in the list
};

// What block_at says, in 32 bits.
__device__ __forceinline__ void place_block(Item& item, const Shape& shape, int number) {
  const int block_size = static_cast<int>(shape.block_size), keys = static_cast<int>(shape.keys);
  if (shape.cu_seqlens_q == nullptr) {
    const int position = number * block_size;
    item.key_begin = position;
    item.keys = min(block_size, keys - position);
    item.shift = keys - static_cast<int>(shape.rows) + 1 - position;
    return;
  }
  const auto key = [&](int i) { return min(max(__ldg(shape.cu_seqlens_k + i), 0), keys); };
  const auto row = [&](int i) { return min(max(__ldg(shape.cu_seqlens_q + i), 0), static_cast<int>(shape.rows)); };
  int low = 0, high = static_cast<int>(shape.sequences) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (key(middle) / block_size + middle <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int begin = key(low), end = key(low + 1), position = (number - begin / block_size - low) * block_size;
  item.key_begin = begin + position;
  item.keys = min(block_size, end - begin - position);
  item.shift = end - begin - row(low + 1) + 1 - position;
}

// Calls f(item) for each block that has tiles in [tile, end) of a unit.
template <class F>
__device__ __forceinline__ void for_each_item(const AttendParams& p, const Schedule& schedule, int local, int tile,
                                              int end, F f) {
  int number = -1;
  while (tile < end) {
    const UnitLists lists(p, schedule, local);
    // Mostly the next one; after lists without entries it is searched for.
    ++number;
    if (number == 0 || lists.tile(number + 1) <= tile) number = lists.block_of(tile);
    const int begin = lists.tile(number), after = min(lists.tile(number + 1), end);
    Item item;
    place_block(item, p.shape, number);
    item.list_begin = lists.entry(number);
    item.list_end = lists.entry(number + 1);
    item.first = tile - begin;
    item.count = after - tile;
    f(item);
    tile = after;
  }
}

}  // namespace moba::cuda::sm90
