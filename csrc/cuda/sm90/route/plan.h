// How one CTA of the gate kernel uses its threads and shared memory.
#pragma once

#include <cstdint>

namespace moba::cuda::sm90 {

// A consumer warpgroup scores 64 queries against 128 block means in one step.
constexpr int kGateQueries = 64;
constexpr int kGateMeans = 128;
// A lane of a warp holds of 8 columns (a group) two in each of two rows: four scores.
constexpr int kGateGroups = kGateMeans / 8;

// The queries of one consumer.
struct GateTile {
  int64_t route;     // offset of the first row
  int32_t rows;      // at most 0: none
  int32_t position;  // of the first row in its sequence
  int32_t steps;     // for all consumers together; -1: no more work
  uint32_t phase;    // of the barrier for the next tile's queries
};

// kKept: room for the best blocks of a row.
template <int kHeadDim, int kKept>
struct GatePlan {
  static constexpr int kConsumers = kKept <= 8 ? 3 : 2;
  // The producer is one thread of a warpgroup, whose registers the consumers get: see plan.h.
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  // Two consumers multiply in turns; of three, one that ranks would hold up the others.
  static constexpr bool kTurns = kConsumers == 2;
  static constexpr int kTileRows = kConsumers * kGateQueries;
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kQueryBytes = kGateQueries * kHeadDim * 2;
  // Each consumer has room for the queries of one tile, which lie in registers from its first step on, so that the next
  // tile's are under way early. Means go through a ring of panels; three, one and a half steps, leave more room for the
  // lists, whose length matters more.
  static constexpr int kSlotBytes = kGateMeans * 128;
  static constexpr int kSlots = kKept > 8 || kHeadDim == 64 ? 4 : 3;
  // The bound of a row knows the scores of this many first steps before they are offered.
  static constexpr int kLookAhead = 2;
  // Candidates are staged in lists of one lane each, which are checked for room after each part of a step. A list that
  // runs full costs a ranking.
  static constexpr int kEntries = kKept == 64 ? 12 : kKept == 16 || kHeadDim == 64 || kKept == 2 ? 16 : 15;
  // Entries are read four at a time, what lies behind them too.
  static constexpr int kAtOnce = 4;
  static_assert(kEntries <= 16);
  static constexpr int kParts = 4;
  static constexpr int kPartGroups = kGateGroups / kParts;
  // Whether rows have a bound from the maxima of classes of columns (bound.cuh).
  static constexpr bool kBounded = kKept <= 16;
  // Candidates of a row that are ranked at a time.
  static constexpr int kFresh = kKept == 2 ? 4 : kKept == 16 ? 20 : 16;

  // Of one warp, which owns 16 rows: four lanes share row lane / 4 and row lane / 4 + 8. The rows of `fresh` and `kept`
  // are padded so that eight of them start in different banks.
  struct Warp {
    alignas(16) uint16_t groups[kEntries][32];
    float4 scores[kEntries][32];  // two columns of the first row, two of the second
    alignas(16) uint64_t fresh[8][kFresh + 2];
    uint64_t kept[16][kKept | 1];
    int32_t counts[16];  // of the kept blocks of a row
    GateTile tile;
  };
  static_assert((kEntries + kAtOnce - 1) / kAtOnce * kAtOnce * (sizeof(float4) + sizeof(uint16_t)) * 32 <= sizeof(Warp),
                "reads behind the last entry");
  struct Memory {
    unsigned char slots[kSlots][kSlotBytes];
    unsigned char queries[kConsumers][kQueryBytes];
    Warp warps[kConsumers * 4];
    GateTile tiles[kConsumers];
    uint64_t mean_full[kSlots], mean_empty[kSlots], query_full[kConsumers], query_empty[kConsumers];
  };
  static_assert(sizeof(Memory) <= 232448, "227 KiB of shared memory");
};

}  // namespace moba::cuda::sm90
