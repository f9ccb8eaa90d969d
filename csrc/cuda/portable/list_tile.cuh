// Finding and reading a tile of a routing list.
#pragma once

#include "cuda/portable/tile.cuh"
#include "cuda/portable/unit.cuh"

namespace moba::cuda {

static_assert(kListTile == kTile);

// An upper bound of the tiles in one unit, from shapes alone: the device finds out which of them exist.
__host__ __device__ inline int64_t max_tiles(const Shape& shape) {
  const int64_t entries = shape.entries();
  const int64_t blocks = shape.blocks();
  return entries / kListTile + (blocks < entries ? blocks : entries);
}

// The block whose list holds `tile`, or -1.
__device__ __forceinline__ int64_t block_of_tile(const int64_t* tile_begin, int64_t blocks, int64_t tile) {
  if (tile >= tile_begin[blocks]) return -1;
  int64_t low = 0, high = blocks - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (tile_begin[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The gathered queries of a tile, in shared memory; lists are in row order, so positions rise.
struct Gathered {
  int64_t entry[kTile];
  int64_t row[kTile];
  int64_t position[kTile];  // -1 beyond the end of the list
};

// All threads, followed by __syncthreads by the caller.
__device__ __forceinline__ void gather(Gathered& gathered, const int64_t* entries, int count, int64_t slots,
                                       const Sequence& sequence) {
  if (threadIdx.x < kTile) {
    const bool exists = threadIdx.x < count;
    const int64_t entry = exists ? entries[threadIdx.x] : 0;
    gathered.entry[threadIdx.x] = entry;
    gathered.row[threadIdx.x] = entry / slots;
    gathered.position[threadIdx.x] = exists ? sequence.position(entry / slots) : -1;
  }
}

// How many of the `keys` keys from position `key` on a query at `position` sees.
__device__ __forceinline__ int visible_keys(int64_t position, int64_t key, int keys) {
  const int64_t count = position + 1 - key;
  return count <= 0 ? 0 : count < keys ? static_cast<int>(count) : keys;
}

}  // namespace moba::cuda
