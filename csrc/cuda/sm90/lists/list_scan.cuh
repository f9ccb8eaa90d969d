// Sums over a warp and a CTA, and the kernel that turns the counts of the lists into places.
#pragma once

#include "cuda/sm90/dependent.cuh"
#include "cuda/sm90/params.h"
#include "cuda/sm90/ptx.cuh"

namespace moba::cuda::sm90 {

constexpr int kScanThreads = 1024;
constexpr int kScanCtas = 8;  // of a key head: a cluster
constexpr unsigned kAll = 0xffffffffu;

struct Sums {
  int32_t entries, tiles;
};
__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.entries + b.entries, a.tiles + b.tiles};
}
__device__ __forceinline__ Sums shift_up(const Sums& sums, int offset) {
  const Sums lower{__shfl_up_sync(kAll, sums.entries, offset), __shfl_up_sync(kAll, sums.tiles, offset)};
  return static_cast<int>(threadIdx.x % 32) >= offset ? lower : Sums{0, 0};
}
__device__ __forceinline__ Sums scan_warp(Sums sums) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) sums = sums + shift_up(sums, offset);
  return sums;
}
__device__ __forceinline__ Sums of_list(int32_t length, int together) {
  const int32_t each = static_cast<int32_t>(kListTile) * together;
  return {length, (length + each - 1) / each * together};
}

// The sum over this thread and those before it; `total` over all.
template <int kWarps>
__device__ __forceinline__ Sums scan_cta(Sums sums, Sums (&warps)[kWarps + 1], Sums& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums = scan_warp(sums);
  if (lane == 31) warps[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    const Sums own = lane < kWarps ? warps[lane] : Sums{0, 0}, all = scan_warp(own);
    if (lane < kWarps) warps[lane] = {all.entries - own.entries, all.tiles - own.tiles};
    if (lane == 31) warps[kWarps] = all;
  }
  __syncthreads();
  sums = sums + warps[warp];
  total = warps[kWarps];
  __syncthreads();
  return sums;
}

// A cluster per key head, each of its CTAs with a range of blocks. Per block, counts become the number of entries in
// earlier chunks; then the lengths of the lists become where they begin, in entries and in tiles.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ PastListsParams p, int chunks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  wait_for_earlier();
  let_next_start();
  constexpr int kAtOnce = 8;  // loads under way
  __shared__ int32_t groups[32][33];
  __shared__ Sums warps[kScanThreads / 32 + 1];
  __shared__ Sums range_sums;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rank = blockIdx.x % kScanCtas, local = blockIdx.x / kScanCtas;
  const int blocks = static_cast<int>(p.shape.blocks());
  const int together = tiles_together(p.shape);
  const int range = (blocks + 32 * kScanCtas - 1) / (32 * kScanCtas) * 32;
  const int begin = min(rank * range, blocks), end = min(begin + range, blocks);
  int32_t* counts = p.lists.counts + static_cast<int64_t>(local) * chunks * blocks;
  int32_t* list_begin = p.lists.list_begin + static_cast<int64_t>(local) * (blocks + 1);
  int32_t* tile_begin = p.lists.tile_begin + static_cast<int64_t>(local) * (blocks + 1);

  const int group = (chunks + 31) / 32;
  const int chunk_begin = min(warp * group, chunks), chunk_end = min(chunk_begin + group, chunks);
  for (int block0 = begin; block0 < end; block0 += 32) {
    int32_t* column = counts + block0 + lane;
    const bool exists = block0 + lane < end;
    int32_t count[kAtOnce], sum = 0;
    const auto load = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        count[i] = exists && chunk + i < chunk_end ? column[static_cast<int64_t>(chunk + i) * blocks] : 0;
      }
    };
    for (int chunk = chunk_begin; chunk < chunk_end; chunk += kAtOnce) {
      load(chunk);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += count[i];
    }
    groups[warp][lane] = sum;
    __syncthreads();
    const int32_t own = groups[lane][warp];
    int32_t all = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t lower = __shfl_up_sync(kAll, all, offset);
      if (lane >= offset) all += lower;
    }
    groups[lane][warp] = all - own;
    if (lane == 31 && block0 + warp < end) list_begin[block0 + warp] = all;
    __syncthreads();
    int32_t before = groups[warp][lane];
    for (int chunk = chunk_begin; chunk < chunk_end; chunk += kAtOnce) {
      if (group > kAtOnce) load(chunk);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (exists && chunk + i < chunk_end) column[static_cast<int64_t>(chunk + i) * blocks] = before;
        before += count[i];
      }
    }
    __syncthreads();
  }

  Sums before{0, 0}, total{0, 0};
  for (int block = begin + threadIdx.x; block < end; block += kScanThreads)
    before = before + of_list(list_begin[block], together);
  scan_cta<kScanThreads / 32>(before, warps, total);
  if (threadIdx.x == 0) range_sums = total;
  cluster_sync();
  before = {0, 0};
  if (lane < rank) {
    before.entries = cluster_load(shared_address(&range_sums.entries), lane);
    before.tiles = cluster_load(shared_address(&range_sums.tiles), lane);
  }
  before = scan_warp(before);
  before = {__shfl_sync(kAll, before.entries, 31), __shfl_sync(kAll, before.tiles, 31)};
  cluster_sync();  // the others' memory stays until all have read it
  for (int block0 = begin; block0 < end; block0 += kScanThreads) {
    const int block = block0 + threadIdx.x;
    const Sums own = of_list(block < end ? list_begin[block] : 0, together);
    const Sums all = before + scan_cta<kScanThreads / 32>(own, warps, total);
    if (block < end) {
      list_begin[block] = all.entries - own.entries;
      tile_begin[block] = all.tiles - own.tiles;
    }
    before = before + total;
  }
  if (rank == kScanCtas - 1 && threadIdx.x == 0) {
    list_begin[blocks] = before.entries;
    tile_begin[blocks] = before.tiles;
  }
#endif
}

}  // namespace moba::cuda::sm90
