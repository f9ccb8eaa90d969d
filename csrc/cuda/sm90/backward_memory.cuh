// How one CTA of the backward products uses its threads, registers and shared memory.
#pragma once

#include "cuda/sm90/backward_work.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90::backward {

// One producer warpgroup, then two consumer warpgroups of 64 keys each. A kernel of 384 threads starts with 168
// registers each; asking for more than that in all would wait forever.
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kWarpgroup + kConsumerThreads;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * (1 + kConsumers));

constexpr uint32_t kNobody = 0xffffffff;

enum Kind : int32_t { kStop, kMore, kLast };  // kLast: of its item

// What the consumers have to know about 64 queries.
struct Tile {
  uint32_t target[kQueryTile];  // row of dq in its key head; kNobody beyond the end
  float lse[kQueryTile], delta[kQueryTile];
  int64_t from_queries[kQueryTile], from_gradients[kQueryTile];  // elements into q and dout, or negative
  Kind kind;
  int32_t shift;                                // key i is not after query j if i <= j + shift
  int32_t masked;                               // whether any pair of the tile does not count
  int32_t unit_k, key_begin, keys, tile, slab;  // see Item
};

template <int kHeadDim>
struct Memory {
  static constexpr int kStages = kHeadDim == 128 ? 3 : 6;
  static constexpr int kKeyPanel = kKeyTile * kPanelRowBytes, kQueryPanel = kQueryTile * kPanelRowBytes;

  unsigned char keys[kKeyTile * kHeadDim * 2], values[kKeyTile * kHeadDim * 2];
  unsigned char queries[kStages][kQueryTile * kHeadDim * 2], gradients[kStages][kQueryTile * kHeadDim * 2];
  unsigned char changes[2][kKeyTile * kQueryTile * 2];  // of the scores: a row a key
  Tile tiles[kStages];
  uint64_t full[kStages], empty[kStages];
  uint64_t keys_full, keys_empty;
  Item items[2];  // keys < 0: no more work
};
static_assert(sizeof(Memory<128>) <= 232448 && sizeof(Memory<64>) <= 232448, "227 KiB of shared memory");

// A place in the ring of tiles with its barrier phase.
template <int kStages>
struct Stage {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace moba::cuda::sm90::backward
