// How one CTA of the attend kernel uses its threads, registers and shared memory.
#pragma once

#include <cstdint>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// One producer warpgroup, then two consumer warpgroups. A kernel of 384 threads starts with 168 registers each; what
// the producer gives up is all that the consumers can get, and asking for more would wait forever.
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 88;
constexpr int kConsumerRegisters = 208;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * (1 + kConsumers));

// A consumer multiplies tiles of 64 gathered queries: one tile of a routing list.
constexpr int kRows = 64;
static_assert(kRows == kListTile);

// What a consumer has to know about a tile of queries.
struct Tile {
  int32_t entry[kRows];  // of its unit; -1 beyond the end of the list
  int32_t steps;         // key tiles to go through; 0: no more work
  int32_t count;         // queries
  int32_t local;         // unit
  int32_t keys;          // of the block
  int32_t shift;     // entry / slots + shift keys of the block are not after the query; at least `keys`: all of them
  int32_t masked;    // whether that can be fewer than `keys`
  int32_t item;      // resident blocks: counts the blocks that this CTA went through
  int32_t releases;  // resident blocks: of 2, how many to give back after this tile
};

// kKeys: keys of one product. Blocks of up to kKeys are resident: loaded once and used for many tiles of queries.
// Larger blocks are streamed once for each pair of query tiles.
template <int kHeadDim, int kKeys>
struct Plan {
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kQuerySlots = kHeadDim == 128 ? 6 : 8;
  static constexpr int kKeySlots = kKeyBytes == 32 * 1024 ? 2 : 4;

  struct Memory {
    unsigned char keys[kKeySlots][kKeyBytes];
    unsigned char values[kKeySlots][kKeyBytes];
    unsigned char queries[kQuerySlots][kQueryBytes];
    Tile tiles[kQuerySlots];
    uint64_t query_full[kQuerySlots], query_empty[kQuerySlots];
    uint64_t key_full[kKeySlots], key_empty[kKeySlots];
    uint64_t value_full[kKeySlots], value_empty[kKeySlots];
  };
  static_assert(sizeof(Memory) <= 232448, "227 KiB of shared memory");
};

// A place in a ring of buffers with its barrier phase.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int count = 1) {
    slot += count;
    if (slot >= kSlots) {
      slot -= kSlots;
      phase ^= 1;
    }
  }
};

}  // namespace moba::cuda::sm90
