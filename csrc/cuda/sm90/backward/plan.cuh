// How one CTA of the backward products uses its threads, registers and shared memory.
#pragma once

#include "cuda/sm90/backward/work.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90::backward {

// One producer warpgroup, then two consumer warpgroups of 64 keys each. A kernel of 384 threads starts with 168
// registers each; asking for more than that in all would wait forever.
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kWarpgroup + kConsumerThreads;
constexpr uint32_t kNobody = 0xffffffff;

enum Kind : int32_t { kStop, kMore, kLast };  // kLast: of its item

// Of the numbers of a query, so that those of the columns that a thread has of a product are neighbours, and in other
// banks than those that other lanes read at the same time.
constexpr int kPlaces = 80;
__device__ __forceinline__ int place_of(int query) { return query % 8 / 2 * 20 + query / 8 * 2 + query % 2; }

// What the consumers have to know about 64 queries.
struct Tile {
  alignas(16) float lse[kPlaces], delta[kPlaces];
  uint32_t target[kQueryTile];  // row of dq in its key head; kNobody beyond the end
  // Where the rows begin in q and dout of the key head, in parts of 16 bytes; negative beyond the end.
  int32_t queries[kQueryTile], gradients[kQueryTile];
  void* rows;  // row 0 of the sums or partials that `target` counts from
  Kind kind;
  int32_t shift;                          // key i is not after query j if i <= j + shift
  int32_t masked;                         // whether any pair of the tile does not count
  int32_t unit_k, key_begin, keys, slab;  // see Item
};

template <int kHeadDim>
struct Memory {
  static constexpr int kStages = kHeadDim == 128 ? 3 : 6;
  static constexpr int kProducerRegisters = kHeadDim == 128 ? 24 : 56;
  static constexpr int kConsumerRegisters = kHeadDim == 128 ? 240 : 224;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * (1 + kConsumers));
  static constexpr int kKeyPanel = kKeyTile * kPanelRowBytes, kQueryPanel = kQueryTile * kPanelRowBytes;

  unsigned char keys[kKeyTile * kHeadDim * 2], values[kKeyTile * kHeadDim * 2];
  unsigned char queries[kStages][kQueryTile * kHeadDim * 2], gradients[kStages][kQueryTile * kHeadDim * 2];
  unsigned char changes[2][kKeyTile * kQueryTile * 2];  // of the scores: a row a key
  Tile tiles[kStages];
  uint64_t full[kStages], empty[kStages];
  uint64_t keys_full, keys_empty;
  int32_t items[2];
};
static_assert(sizeof(Memory<128>) <= 232448 && sizeof(Memory<64>) <= 232448, "227 KiB of shared memory");

}  // namespace moba::cuda::sm90::backward
