// Routing lists by a counting sort that is stable, so that the same route always gives the same lists: rows are cut
// into chunks, one warp counts and later places the entries of one chunk in their order.
#include "cuda/launch.h"
#include "cuda/portable/unit.cuh"

namespace moba::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kWarpThreads = 32 * kWarps;
constexpr int kScanThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int64_t warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; }

// Reads the route, whose values are not trusted: what is outside 0..current or repeats an earlier slot becomes -1.
// kLanes lanes a row, and all 32 of a warp where there are more slots; a bit per block then remembers what earlier
// slots hold.
template <int kLanes>
__global__ void __launch_bounds__(kWarpThreads) read_route_kernel(ListsParams p) {
  constexpr int kWords = 256;
  constexpr int64_t kBits = 32 * kWords;
  __shared__ uint32_t seen_words[kWarps][kWords];
  uint32_t* seen = seen_words[threadIdx.x / 32];

  const Shape& shape = p.shape;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kWarpThreads + threadIdx.x) / kLanes;
  const int64_t local = index / shape.rows, row = index % shape.rows;
  const bool exists = local < p.lists.units.count;
  int64_t current = -1, first = 0;
  if (exists) {
    const Sequence sequence = sequence_of_row(shape, row);
    const int64_t position = row < sequence.row_begin + sequence.rows ? sequence.position(row) : -1;
    current = position < 0 ? -1 : position / shape.block_size;
    first = first_part(sequence.key_begin, sequence.index, shape.block_size);
  }
  const int32_t* route = unit_base<int32_t>(p.route, p.lists.units.begin + local, shape.heads) + row * p.route.row;
  int32_t* choices = p.lists.choices + (local * shape.rows + row) * shape.slots;
  int64_t last = max(current, int64_t(0));  // of the rows of the warp
  if (kLanes < 32) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) last = max(last, __shfl_xor_sync(kAll, last, offset));
  }

  const bool several = shape.slots > kLanes;
  for (int64_t base = 0; base <= last; base += kBits) {
    if (several) {
      for (int i = lane(); i < kWords; i += 32) seen[i] = 0;
      __syncwarp();
    }
    for (int64_t slot0 = 0; slot0 < shape.slots; slot0 += kLanes) {
      const int64_t slot = slot0 + lane() % kLanes;
      const bool there = exists && slot < shape.slots;
      const int64_t block = there ? int64_t(route[slot]) : -1;
      const bool valid = block >= 0 && block <= current;
      const bool here = valid && block >= base && block < base + kBits;
      const int bit = here ? static_cast<int>(block - base) : 0;
      const unsigned same =
          __match_any_sync(kAll, here ? lane() / kLanes * static_cast<int>(kBits) + bit : -1 - lane());
      bool keep = here && __ffs(same) - 1 == lane();
      if (several) {
        keep = keep && !(seen[bit / 32] >> bit % 32 & 1);
        __syncwarp();
        if (keep) atomicOr(&seen[bit / 32], 1u << bit % 32);
        __syncwarp();
      }
      if (here || (!valid && there && base == 0)) choices[slot] = keep ? static_cast<int32_t>(first + block) : -1;
    }
  }
}

// The entries of this warp's chunk, 32 at a time and in order: step(entry, block) by all lanes, block -1 for none.
template <class Step>
__device__ __forceinline__ void for_each_entry(const ListsParams& p, int64_t local, int64_t chunk, Step step) {
  constexpr int kAtOnce = 4;  // loads under way
  const int64_t rows = (p.shape.rows + p.lists.chunks - 1) / p.lists.chunks;
  const int64_t begin = chunk * rows * p.shape.slots;
  const int64_t end = min(begin + rows * p.shape.slots, p.shape.entries());
  const int32_t* choices = p.lists.choices + local * p.shape.entries();
  for (int64_t entry0 = begin; entry0 < end; entry0 += 32 * kAtOnce) {
    int32_t blocks[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t entry = entry0 + 32 * i + lane();
      blocks[i] = entry < end ? choices[entry] : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) step(entry0 + 32 * i + lane(), blocks[i]);
  }
}

// A warp counts in shared memory where there are few enough blocks, else in its part of Lists::counts.
constexpr int64_t kSharedBlocks = 48 * 1024 / kWarps / static_cast<int64_t>(sizeof(int32_t));

template <bool kShared>
__device__ __forceinline__ int32_t* warp_counts(int32_t* counts, int64_t blocks) {
  extern __shared__ int32_t shared_counts[];
  return kShared ? shared_counts + threadIdx.x / 32 * blocks : counts;
}

template <bool kShared>
__global__ void __launch_bounds__(kWarpThreads) count_kernel(ListsParams p) {
  const int64_t blocks = p.shape.blocks();
  const int64_t local = warp() / p.lists.chunks, chunk = warp() % p.lists.chunks;
  if (local >= p.lists.units.count) return;
  int32_t* total = p.lists.counts + warp() * blocks;
  int32_t* counts = warp_counts<kShared>(total, blocks);
  for (int64_t block = lane(); block < blocks; block += 32) counts[block] = 0;
  __syncwarp();
  for_each_entry(p, local, chunk, [&](int64_t, int32_t block) {
    const unsigned same = __match_any_sync(kAll, block);
    if (block >= 0 && __ffs(same) - 1 == lane()) counts[block] += __popc(same);
    __syncwarp();
  });
  if (kShared) {
    for (int64_t block = lane(); block < blocks; block += 32) total[block] = counts[block];
  }
}

// Per block: counts become the number of entries in earlier chunks, list_begin the length of the list.
__global__ void __launch_bounds__(kScanThreads) scan_chunks_kernel(ListsParams p) {
  const int64_t blocks = p.shape.blocks();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  const int64_t local = index / blocks, block = index % blocks;
  if (local >= p.lists.units.count) return;
  int32_t* counts = p.lists.counts + local * p.lists.chunks * blocks + block;
  constexpr int kAtOnce = 16;  // loads under way
  int32_t total = 0;
  for (int64_t chunk = 0; chunk < p.lists.chunks; chunk += kAtOnce) {
    int32_t count[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) count[i] = chunk + i < p.lists.chunks ? counts[(chunk + i) * blocks] : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (chunk + i < p.lists.chunks) counts[(chunk + i) * blocks] = total;
      total += count[i];
    }
  }
  p.lists.list_begin[local * (blocks + 1) + block] = total;
}

// Per unit: list lengths become positions, in entries and in tiles.
__global__ void __launch_bounds__(kScanThreads) scan_blocks_kernel(ListsParams p) {
  __shared__ int64_t entry_sums[kScanThreads / 32], tile_sums[kScanThreads / 32];
  const int64_t blocks = p.shape.blocks();
  int64_t* list_begin = p.lists.list_begin + blockIdx.x * (blocks + 1);
  int64_t* tile_begin = p.lists.tile_begin + blockIdx.x * (blocks + 1);
  int64_t entries_before = 0, tiles_before = 0;
  for (int64_t block0 = 0; block0 < blocks; block0 += kScanThreads) {
    const int64_t block = block0 + threadIdx.x;
    const int64_t length = block < blocks ? list_begin[block] : 0;
    int64_t entries = length, tiles = (length + kListTile - 1) / kListTile;
    const int64_t own_tiles = tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t more_entries = __shfl_up_sync(kAll, entries, offset);
      const int64_t more_tiles = __shfl_up_sync(kAll, tiles, offset);
      if (lane() >= offset) {
        entries += more_entries;
        tiles += more_tiles;
      }
    }
    if (lane() == 31) {
      entry_sums[threadIdx.x / 32] = entries;
      tile_sums[threadIdx.x / 32] = tiles;
    }
    __syncthreads();
    int64_t entries_here = 0, tiles_here = 0;
    for (int i = 0; i < kScanThreads / 32; ++i) {
      if (i == threadIdx.x / 32) {
        entries += entries_before + entries_here;
        tiles += tiles_before + tiles_here;
      }
      entries_here += entry_sums[i];
      tiles_here += tile_sums[i];
    }
    if (block < blocks) {
      list_begin[block] = entries - length;
      tile_begin[block] = tiles - own_tiles;
    }
    entries_before += entries_here;
    tiles_before += tiles_here;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    list_begin[blocks] = entries_before;
    tile_begin[blocks] = tiles_before;
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kWarpThreads) place_kernel(ListsParams p) {
  const int64_t blocks = p.shape.blocks();
  const int64_t local = warp() / p.lists.chunks, chunk = warp() % p.lists.chunks;
  if (local >= p.lists.units.count) return;
  int32_t* before_chunk = p.lists.counts + warp() * blocks;
  int32_t* counts = warp_counts<kShared>(before_chunk, blocks);
  if (kShared) {
    for (int64_t block = lane(); block < blocks; block += 32) counts[block] = before_chunk[block];
    __syncwarp();
  }
  const int64_t* list_begin = p.lists.list_begin + local * (blocks + 1);
  int64_t* entries = p.lists.entries + local * p.shape.entries();
  for_each_entry(p, local, chunk, [&](int64_t entry, int32_t block) {
    const unsigned same = __match_any_sync(kAll, block);
    const int32_t before = block >= 0 ? counts[block] : 0;
    __syncwarp();
    if (block >= 0) {
      entries[list_begin[block] + before + __popc(same & ((1u << lane()) - 1))] = entry;
      if (__ffs(same) - 1 == lane()) counts[block] = before + __popc(same);
    }
    __syncwarp();
  });
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kLanes>
cudaError_t launch_read_route(const ListsParams& p, cudaStream_t stream) {
  const int64_t grid = ceil_divide(p.lists.units.count * p.shape.rows * kLanes, kWarpThreads);
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  read_route_kernel<kLanes><<<static_cast<unsigned>(grid), kWarpThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <bool kShared>
void launch_sort(const ListsParams& p, unsigned chunk_grid, unsigned scan_grid, cudaStream_t stream) {
  const int bytes = kShared ? static_cast<int>(p.shape.blocks() * kWarps * sizeof(int32_t)) : 0;
  count_kernel<kShared><<<chunk_grid, kWarpThreads, bytes, stream>>>(p);
  scan_chunks_kernel<<<scan_grid, kScanThreads, 0, stream>>>(p);
  scan_blocks_kernel<<<static_cast<unsigned>(p.lists.units.count), kScanThreads, 0, stream>>>(p);
  place_kernel<kShared><<<chunk_grid, kWarpThreads, bytes, stream>>>(p);
}

}  // namespace

cudaError_t launch_lists(const ListsParams& p, cudaStream_t stream) {
  const int64_t units = p.lists.units.count;
  const int64_t chunk_grid = ceil_divide(units * p.lists.chunks, kWarps);
  const int64_t scan_grid = ceil_divide(units * p.shape.blocks(), kScanThreads);
  if (!fits_grid(chunk_grid) || !fits_grid(scan_grid) || !fits_grid(units)) return cudaErrorInvalidValue;
  const cudaError_t status = p.shape.slots <= 4   ? launch_read_route<4>(p, stream)
                             : p.shape.slots <= 8 ? launch_read_route<8>(p, stream)
                                                  : launch_read_route<32>(p, stream);
  if (status != cudaSuccess) return status;
  const auto sort = p.shape.blocks() <= kSharedBlocks ? launch_sort<true> : launch_sort<false>;
  sort(p, static_cast<unsigned>(chunk_grid), static_cast<unsigned>(scan_grid), stream);
  return cudaGetLastError();
}

}  // namespace moba::cuda
