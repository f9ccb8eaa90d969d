// How one CTA of the current-block kernel uses its threads, registers and shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/sm90/params.h"
#include "cuda/sm90/pipeline.cuh"

namespace moba::cuda::sm90::current {

enum class Mode {
  kDense,   // no partial results
  kMasked,  // none either: the keys of all blocks that a row chose, from the begin of the sequence
  kShort,   // blocks of about one key tile: shared memory is for the partial results
  kLong,    // blocks of many: shared memory is for keys and values
};

constexpr int kRows = 64;        // of a consumer
constexpr int kGatherRows = 32;  // of a stage, gathered by one warp
constexpr int kKeys = 128;       // of one product
// Consumers take turns at the tensor cores in tiles of so many key tiles; in shorter ones they would only wait.
constexpr int kTurnSteps = 3;
// kMasked: the key tiles of a sequence are the bits of a word.
constexpr int kMaskedSteps = 64;

// Named barriers, one a consumer.
constexpr int kTurnBarrier = 1;
constexpr int kValuesBarrier = 4;

// Queries that follow each other, of one sequence of a unit. Positions and `key` count from the first key of the
// sequence.
struct Tile {
  int32_t unit, row, rows;
  int32_t position;   // of the first row
  int32_t key;        // the first that any row sees: where the block of the first row begins
  int32_t key_begin;  // of the sequence, in the unit
  int32_t steps;      // key tiles that hold all keys of the rows; 0: no more work
};

// One partial result of each row of a consumer, in the order of slots without those that hold none.
template <int kHeadDim>
struct alignas(16) Stage {
  unsigned char rows[kRows * kHeadDim * 2];
  float lse[kRows];  // minus infinity: none
  // The same in all stages of a tile:
  uint32_t has_current[kRows / 32];  // a bit a row
  int32_t stages;                    // of the tile; where it is 0, one stage is sent that holds nothing
};

template <int kHeadDim, int kConsumers, int kStages>
struct Past {
  Stage<kHeadDim> stages[kConsumers][kStages];
  uint64_t full[kConsumers][kStages], empty[kConsumers][kStages];
};

// The key tiles that rows chose, a bit each, counted from the first key of the sequence.
struct Choice {
  uint64_t rows[2 * kRows];
  uint64_t any[2];  // of each consumer's rows, and the last key tile; none beyond it
};
constexpr int kChoices = 2;
struct Choices {
  Choice choices[kChoices];
  uint64_t full[kChoices], empty[kChoices];
};
struct Nothing {};

template <int kHeadDim, Mode kMode>
struct Plan {
  static constexpr bool kMasked = kMode == Mode::kMasked;
  static constexpr bool kPast = kMode != Mode::kDense && !kMasked;
  // The producers (a warpgroup whose first thread loads by TMA and, for partial results, one whose warps gather them),
  // then consumer warpgroups of 64 queries each. All start with kStartRegisters; what the producers give up is all that
  // the consumers can get.
  static constexpr int kProducers = kPast ? 2 : 1;
  static constexpr int kConsumers = 2;
  static constexpr int kTileRows = kConsumers * kRows;
  static constexpr int kThreads = kWarpgroup * (kProducers + kConsumers);
  static constexpr int kStartRegisters = kPast ? 128 : 168;
  static constexpr int kProducerRegisters = !kPast ? (kMasked ? 56 : 40) : kHeadDim == 128 ? 48 : 64;
  static constexpr int kConsumerRegisters = !kPast ? (kMasked ? 224 : 232) : kHeadDim == 128 ? 208 : 192;
  static_assert(kProducers * kProducerRegisters + kConsumers * kConsumerRegisters <=
                kStartRegisters * (kProducers + kConsumers));

  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  // A consumer reads the description of a tile for longer than its queries: until it begins the next one.
  static constexpr int kTiles = 4;
  static constexpr int kQuerySlots = kMode == Mode::kShort || (kPast && kHeadDim == 128) ? 1 : 2;
  static constexpr int kKeySlots = kMode == Mode::kShort ? 1 : kHeadDim == 128 ? 2 : 4;
  static constexpr int kStages = (kMode == Mode::kShort ? 4 : 2) * (kHeadDim == 128 ? 1 : 2);

  struct Memory {
    unsigned char keys[kKeySlots][kKeyBytes];
    unsigned char values[kKeySlots][kKeyBytes];
    unsigned char queries[kQuerySlots][kConsumers][kQueryBytes];
    std::conditional_t<kPast, Past<kHeadDim, kConsumers, kStages>, Nothing> past;
    std::conditional_t<kMasked, Choices, Nothing> chosen;
    Tile tiles[kTiles];
    uint64_t query_full[kQuerySlots], query_empty[kQuerySlots];
    uint64_t key_full[kKeySlots], key_empty[kKeySlots];
    uint64_t value_full[kKeySlots], value_empty[kKeySlots];
  };
  static_assert(sizeof(Memory) <= 232448, "227 KiB of shared memory");
};

// A place in a ring of buffers with its barrier phase, in one register.
template <int kSlots>
struct Ring {
  uint32_t count = 0;

  __device__ __forceinline__ uint32_t slot() const { return count % kSlots; }
  __device__ __forceinline__ uint32_t phase() const { return count / kSlots & 1; }
  __device__ __forceinline__ void advance() { ++count; }
};

}  // namespace moba::cuda::sm90::current
