// Cuts the work of the products into items: key tile after key tile, long ones into several shares. One thread block.
#pragma once

#include "cuda/sm90/backward_tiles.cuh"

namespace moba::cuda::sm90::backward {

struct Counts {
  int64_t query_tiles;
  int32_t items, splits, slabs;

  __device__ __forceinline__ Counts operator+(const Counts& other) const {
    return {query_tiles + other.query_tiles, items + other.items, splits + other.splits, slabs + other.slabs};
  }
  __device__ __forceinline__ Counts shuffled_up(int offset) const {
    constexpr unsigned kAll = 0xffffffffu;
    return {__shfl_up_sync(kAll, query_tiles, offset), __shfl_up_sync(kAll, items, offset),
            __shfl_up_sync(kAll, splits, offset), __shfl_up_sync(kAll, slabs, offset)};
  }
};

// The sum over the threads before this one, and over all.
template <int kThreads>
__device__ __forceinline__ void scan(const Counts& own, Counts& before, Counts& all) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Counts sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Counts sum = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Counts other = sum.shuffled_up(offset);
    if (lane >= offset) sum = other + sum;
  }
  const Counts first = sum.shuffled_up(1);
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  before = all = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = all;
    all = all + sums[i];
  }
  if (lane > 0) before = before + first;
}

// How many items share a key tile with `count` query tiles that comes after `before` of `total`.
__device__ __forceinline__ int32_t shares_of(int64_t count, int64_t before, int64_t total, int processors) {
  if (count == 0) return 0;
  const bool late = total - before < processors * kLastTiles;
  const int64_t size = late ? kSmallestItem : max(kSmallestItem, total / (processors * kItemsPerProcessor));
  return static_cast<int32_t>(max((count + size / 2) / size, int64_t(1)));
}

template <int kThreads>
__device__ __forceinline__ void cut_into_items(const BackwardParams& p, const Workspace& work, const Pass& pass,
                                               int processors) {
  const int64_t tiles = p.lists.units_k.count * p.shape.blocks() * pass.tiles;
  const int64_t each = (tiles + kThreads - 1) / kThreads;
  const int64_t begin = min(threadIdx.x * each, tiles), end = min(begin + each, tiles);

  Counts own{}, before, all;
  for (int64_t i = begin; i < end; ++i) own.query_tiles += key_tile(p, pass, i).count;
  scan<kThreads>(own, before, all);
  const int64_t total = all.query_tiles;
  const auto counts = [&](const Item& item, int64_t query_tiles_before) -> Counts {
    if (item.keys == 0) return {};
    const int32_t shares = shares_of(item.count, query_tiles_before, total, processors);
    return {item.count, shares, shares != 1, shares > 1 ? shares : 0};
  };
  own = {};
  for (int64_t i = begin; i < end; ++i) {
    own = own + counts(key_tile(p, pass, i), before.query_tiles + own.query_tiles);
  }
  scan<kThreads>(own, before, all);
  for (int64_t i = begin; i < end; ++i) {
    Item item = key_tile(p, pass, i);
    const Counts here = counts(item, before.query_tiles);
    item.slab = before.slabs;
    item.shares = here.items;
    if (here.splits) work.splits[before.splits] = item;
    const int32_t count = item.count;
    for (int32_t share = 0; share < here.items; ++share) {
      item.first = static_cast<int32_t>(int64_t(count) * share / here.items);
      item.count = static_cast<int32_t>(int64_t(count) * (share + 1) / here.items) - item.first;
      work.items[before.items + share] = item;
      ++item.slab;
    }
    before = before + here;
  }
  if (threadIdx.x == 0) {
    work.counters->items = all.items;
    work.counters->next = 0;
    work.counters->splits = all.splits;
  }
}

}  // namespace moba::cuda::sm90::backward
