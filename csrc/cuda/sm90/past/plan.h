// How one CTA of the past kernel uses its threads, registers and shared memory.
#pragma once

#include <cstdint>

#include "cuda/sm90/params.h"
#include "cuda/sm90/pipeline.cuh"

namespace moba::cuda::sm90 {

// A consumer multiplies tiles of 64 gathered queries: one tile of a routing list.
constexpr int kRows = 64;
static_assert(kRows == kListTile);

// What gatherers and consumers have to know about a tile of queries.
struct Tile {
  alignas(16) uint32_t entry[kRows];  // beyond the end of the list: its last
  const void* queries;                // row 0 of the first head of the group
  int64_t first;                      // first entry, in the partials
  int32_t count;                      // queries; streamed blocks: 0 where only the other consumer has a tile
  int32_t item;      // resident blocks: counts the blocks that this CTA went through; negative: no more work
  int32_t releases;  // resident blocks: how many of the consumers' releases to give after this tile
};

// kKeys: keys of one product. Blocks of up to kKeys are resident: loaded once and used for many tiles of queries.
// Larger blocks are streamed once for each kConsumers query tiles.
template <int kHeadDim, int kKeys, bool kResident>
struct Plan {
  // One producer warpgroup, then the consumers. A kernel of 384 threads starts with 168 registers each; what the
  // producer gives up is all that the consumers can get, and asking for more would wait forever.
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kThreads / 8 * 8 * (1 + kConsumers));

  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kQuerySlots = kHeadDim == 128 ? 4 : 8;
  static constexpr int kKeySlots = kKeyBytes == 32 * 1024 ? 2 : 4;
  // A consumer without a tile of a resident block skips the block. Its wait for the next one in that slot must not pass
  // because of the one before, so there are twice as many barriers as slots.
  static constexpr int kFullBarriers = kResident ? 2 * kKeySlots : kKeySlots;
  static constexpr int kTileSlots = 8;
  static constexpr int kShareSlots = 4;

  struct Memory {
    unsigned char keys[kKeySlots][kKeyBytes];
    unsigned char values[kKeySlots][kKeyBytes];
    unsigned char queries[kQuerySlots][kQueryBytes];
    unsigned char results[4 * kConsumers][kQueryBytes / 4];  // of a consumer's warp, on their way out
    Tile tiles[kTileSlots];
    int32_t shares[kShareSlots];  // that this CTA took; negative: no more
    uint64_t share_full[kShareSlots], share_empty[kShareSlots];
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t query_full[kQuerySlots], query_empty[kQuerySlots];
    uint64_t key_full[kFullBarriers], key_empty[kKeySlots];
    uint64_t value_full[kFullBarriers], value_empty[kKeySlots];
  };
  static_assert(sizeof(Memory) <= 232448, "227 KiB of shared memory");
};

}  // namespace moba::cuda::sm90
