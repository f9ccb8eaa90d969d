// Cuts the work of the products into items: key tile after key tile, long ones into several shares. One CTA.
#include "cuda/sm90/backward_tiles.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreads = 1024;

struct Counts {
  int64_t query_tiles;
  int32_t items, splits, slabs;

  __device__ Counts operator+(const Counts& other) const {
    return {query_tiles + other.query_tiles, items + other.items, splits + other.splits, slabs + other.slabs};
  }
};

// The sum over the threads before this one, and over all.
__device__ void scan(const Counts& own, Counts& before, Counts& all) {
  __shared__ Counts sums[kThreads];
  __syncthreads();
  sums[threadIdx.x] = own;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const Counts other = threadIdx.x >= step ? sums[threadIdx.x - step] : Counts{};
    __syncthreads();
    sums[threadIdx.x] = other + sums[threadIdx.x];
  }
  __syncthreads();
  before = threadIdx.x > 0 ? sums[threadIdx.x - 1] : Counts{};
  all = sums[kThreads - 1];
}

struct Cutter {
  const BackwardParams& p;
  const Pass& pass;
  int processors;
  int64_t total = 0;  // query tiles

  __device__ Item tile(int64_t index) const { return key_tile(p, pass, index); }

  // Of a key tile with `count` query tiles that comes after `before` query tiles of others.
  __device__ int32_t shares(int64_t count, int64_t before) const {
    if (count == 0) return 0;
    const bool late = total - before < processors * kLastTiles;
    const int64_t size = late ? kSmallestItem : max(kSmallestItem, total / (processors * kItemsPerProcessor));
    return static_cast<int32_t>(max((count + size / 2) / size, int64_t(1)));
  }

  __device__ Counts counts(const Item& item, int64_t before) const {
    if (item.keys == 0) return {};
    const int32_t parts = shares(item.count, before);
    return {item.count, parts, parts != 1, parts > 1 ? parts : 0};
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    items_kernel(const __grid_constant__ BackwardParams p, Workspace work, Pass pass, int processors) {
  Cutter cutter{p, pass, processors};
  const int64_t tiles = p.lists.units_k.count * p.shape.blocks() * pass.tiles;
  const int64_t each = (tiles + kThreads - 1) / kThreads;
  const int64_t begin = min(threadIdx.x * each, tiles), end = min(begin + each, tiles);

  Counts own{}, before, all;
  for (int64_t i = begin; i < end; ++i) own.query_tiles += cutter.tile(i).count;
  scan(own, before, all);
  cutter.total = all.query_tiles;
  own = {};
  for (int64_t i = begin; i < end; ++i) {
    own = own + cutter.counts(cutter.tile(i), before.query_tiles + own.query_tiles);
  }
  scan(own, before, all);
  for (int64_t i = begin; i < end; ++i) {
    Item item = cutter.tile(i);
    const Counts here = cutter.counts(item, before.query_tiles);
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

}  // namespace

cudaError_t launch_items(const BackwardParams& p, const Workspace& work, const Pass& pass, int processors,
                         cudaStream_t stream) {
  items_kernel<<<1, kThreads, 0, stream>>>(p, work, pass, processors);
  return cudaGetLastError();
}

}  // namespace moba::cuda::sm90::backward
