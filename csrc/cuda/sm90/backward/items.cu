// Cuts the work of the products into items: key tile after key tile, long ones into several shares. One thread block.
#include "cuda/sm90/backward/tiles.cuh"
#include "cuda/sm90/dependent.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreads = 1024;

struct Counts {
  int32_t query_tiles, items, splits, slabs;

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

__device__ __forceinline__ int64_t sum_of_all(int64_t own) {
  __shared__ int64_t sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(0xffffffffu, own, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
  __syncthreads();
  int64_t all = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) all += sums[i];
  return all;
}

// Writes the items of one key tile, and the key tile itself if its dk and dv are a sum of slabs.
__device__ __forceinline__ void write_items(const Workspace& work, Item item, const Counts& before, int32_t shares) {
  item.slab = before.slabs;
  item.shares = shares;
  if (shares != 1) work.splits[before.splits] = item;
  const int32_t count = item.count;
  for (int32_t share = 0; share < shares; ++share) {
    item.first = static_cast<int32_t>(int64_t(count) * share / shares);
    item.count = static_cast<int32_t>(int64_t(count) * (share + 1) / shares) - item.first;
    work.items[before.items + share] = item;
    ++item.slab;
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    items_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work,
                 const __grid_constant__ Pass pass, int processors) {
  wait_for_earlier();
  let_next_start();
  const int tiles = static_cast<int>(p.lists.units_k.count) * work.unit_tiles;
  int64_t own = 0;
  for (int i = threadIdx.x; i < tiles; i += kThreads) own += key_tile(p, work, pass, i).count;
  const int64_t total = sum_of_all(own);
  int64_t query_tiles = 0;
  Counts done{};
  for (int first = 0; first < tiles; first += kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    const Item item = index < tiles ? key_tile(p, work, pass, index) : Item{};
    Counts before, all;
    scan({item.count, 0, 0, 0}, before, all);
    const int32_t shares = shares_of(item.count, query_tiles + before.query_tiles, total, processors);
    query_tiles += all.query_tiles;
    const bool exists = item.keys > 0;
    scan({0, shares, exists && shares != 1, shares > 1 ? shares : 0}, before, all);
    if (exists) write_items(work, item, done + before, shares);
    done = done + all;
  }
  if (threadIdx.x == 0) {
    work.counters->items = done.items;
    work.counters->next = 0;
    work.counters->splits = done.splits;
  }
}

}  // namespace

cudaError_t launch_items(const BackwardParams& p, const Workspace& work, const Pass& pass, int processors,
                         cudaStream_t stream) {
  return launch_dependent(items_kernel, {1, kThreads, 0}, stream, p, work, pass, processors);
}

}  // namespace moba::cuda::sm90::backward
