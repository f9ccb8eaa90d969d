// What the stages of the backward pass hand to each other.
#pragma once

#include <type_traits>

#include "cuda/sm90/backward/backward.h"
#include "cuda/sm90/pipeline.cuh"

namespace moba::cuda::sm90::backward {

constexpr int kKeyTile = 128;
constexpr int kQueryTile = 64;
constexpr uint32_t kRowMask = kMaxRows - 1;  // of an entry

// A share of the queries of a key tile: first the rows of its own block at or after its first key, head after head,
// then the list of its block. Rows and keys are numbered in their unit.
struct Item {
  int32_t unit_k;           // of the lists
  int32_t key_begin, keys;  // keys <= kKeyTile
  int32_t tile;             // key tile of its block, counted from the first of the pass
  int32_t own_begin;        // first row of the own block
  int32_t own_rows;         // of each head
  int32_t own_shift;        // keys of the tile before the position of own_begin
  int32_t list_begin, list_end;
  int32_t first, count;  // query tiles
  int32_t slab;          // where dk and dv go if `shares` is not 1
  int32_t shares;        // of the key tile
};

// The rows of a unit, with a short division.
template <class T, class Rows>
__device__ __forceinline__ auto unit_rows(const Rows& rows, int64_t unit, int64_t heads) {
  const uint32_t number = static_cast<uint32_t>(unit), all = static_cast<uint32_t>(heads);
  using Element = std::conditional_t<std::is_same_v<Rows, Source>, const T, T>;
  return static_cast<Element*>(rows.data) + number / all * rows.group + number % all * rows.head;
}

struct Counters {
  int32_t items, next, splits;
  int32_t broken;  // whether a gradient was not finite
};

// Key tiles of every block, of which the pass takes some.
struct Pass {
  int32_t tile_begin, tiles;
  bool first, last;
};

struct Workspace {
  // Of the shape, so that kernels need no divisions.
  int32_t heads;          // per key head
  int64_t rows, entries;  // of one key head: of its heads together
  int64_t partial_rows;   // of one key head: its entries, then its rows
  int32_t block_tiles;    // see below
  int32_t unit_tiles;     // see below
  int32_t pass_tiles;     // key tiles of a block for which there are partials at a time

  float* lse;      // [units_k, heads per key head, rows], to base 2; infinite where a row sees nothing
  float* own_lse;  // the same, infinite also where a row did not choose its current block
  float* delta;    // sum(dout * out) - dlse
  // Columns are permuted within each 16 (sums) or 32 (partials), so that a thread's part of a product is 16 bytes.
  float* sums;     // [units_k, heads per key head, rows, head_dim]
  void* partials;  // [units_k, partial_rows, pass_tiles, head_dim], dtype of q
  Item* items;
  Item* splits;  // key tiles whose shares are not 1: dk and dv are the sum of the slabs from `slab` on
  float* slabs;  // [slabs, 2, kKeyTile * head_dim], in the order of the threads
  Counters* counters;
};

constexpr int64_t heads_rows(const Shape& shape) { return shape.heads_per_key_head() * shape.rows; }
constexpr int64_t partial_rows(const Shape& shape) { return capacity(shape) + heads_rows(shape); }
// Key tiles of one block.
constexpr int64_t block_tiles(const Shape& shape) {
  const int64_t keys = shape.block_size < shape.keys ? shape.block_size : shape.keys;
  return (keys + kKeyTile - 1) / kKeyTile;
}
// Key tiles of a unit are numbered, block after block. In a packed batch those of the sequence with this index, whose
// keys begin at `key`, begin at sequence_tiles: few numbers stay unused, though the last block of a sequence may be
// short. That is room for all, as n blocks and a rest of r keys have n T + ceil(r / 128) <= (n + r / block) T + 1
// tiles.
constexpr int64_t sequence_tiles(const Shape& shape, int64_t key, int64_t index) {
  return key * block_tiles(shape) / (shape.block_size < shape.keys ? shape.block_size : shape.keys) + index;
}
constexpr int64_t unit_tiles(const Shape& shape) {
  return shape.cu_seqlens_k == nullptr ? shape.blocks() * block_tiles(shape)
                                       : sequence_tiles(shape, shape.keys, shape.sequences);
}

// Work is cut so finely that each of `processors` gets several items, the last ones smaller.
constexpr int64_t kItemsPerProcessor = 4;
constexpr int64_t kLastTiles = 24;     // query tiles of each processor that are cut finely
constexpr int64_t kSmallestItem = 12;  // query tiles
constexpr int64_t max_slabs(int64_t processors) {
  return processors * (kItemsPerProcessor + kLastTiles / kSmallestItem) * 4 / 3;
}

cudaError_t launch_prepare(const BackwardParams& p, const Workspace& work, bool reduce, Dtype dtype,
                           cudaStream_t stream);
cudaError_t launch_items(const BackwardParams& p, const Workspace& work, const Pass& pass, int processors,
                         cudaStream_t stream);
cudaError_t launch_splits(const BackwardParams& p, const Workspace& work, int processors, Dtype dtype,
                          cudaStream_t stream);
cudaError_t launch_repair(const BackwardParams& p, const Workspace& work, int processors, Dtype dtype,
                          cudaStream_t stream);
cudaError_t launch_queries(const BackwardParams& p, const Workspace& work, const Pass& pass, bool reduce, Dtype dtype,
                           cudaStream_t stream);

// The products: each combination of dtype and head_dim is compiled in a file of its own.
template <class T, int kHeadDim>
struct Products {
  static cudaError_t launch(const BackwardParams& p, const Workspace& work, bool reduce, int processors,
                            cudaStream_t stream);
};

}  // namespace moba::cuda::sm90::backward
