// Which key tiles the rows of a tile chose, for Mode::kMasked: looked up in the route ahead of the products.
#pragma once

#include "cuda/sm90/current/rows.cuh"
#include "cuda/sm90/current/tile.cuh"

namespace moba::cuda::sm90::current {

// Of one row: its slots, and the block that holds it, or -1 for a row that has none.
struct RowChoice {
  const int32_t* slots;
  int current;

  __device__ __forceinline__ RowChoice(const CurrentParams& p, const Schedule& schedule, const Tile& tile, int row)
      : slots(unit_base<int32_t>(p.route, tile.unit, p.shape.heads) + (tile.row + row) * p.route.row),
        current(row < tile.rows && tile.position + row >= 0 ? (tile.position + row) / schedule.chosen_size : -1) {}

  // A given route can repeat blocks, leave out the current one, or hold numbers of none that the row can see.
  __device__ __forceinline__ uint64_t bits(const Schedule& schedule, int slot) const {
    const int block = current >= 0 ? __ldg(slots + slot) : -1;
    if (block < 0 || block > current) return 0;
    const int step = block * schedule.chosen_steps;
    return step < kMaskedSteps ? schedule.chosen_bits << step : 0;
  }
};

__device__ __forceinline__ uint64_t reduce_or(uint64_t bits) {
  const uint32_t low = __reduce_or_sync(kAll, static_cast<uint32_t>(bits));
  const uint32_t high = __reduce_or_sync(kAll, static_cast<uint32_t>(bits >> 32));
  return static_cast<uint64_t>(high) << 32 | low;
}

// One warp: the rows of one consumer.
template <int kHeadDim>
struct Chooser {
  using P = Plan<kHeadDim, Mode::kMasked>;
  static constexpr int kLaneRows = kRows / 32;

  const CurrentParams& p;
  const Schedule& schedule;
  typename P::Memory& memory;
  int consumer;

  Ring<kChoices> ring;

  __device__ __forceinline__ void choose(const Tile& tile) {
    const int first_row = consumer * kRows + lane();
    const RowChoice first(p, schedule, tile, first_row);
    uint64_t bits[kLaneRows] = {};
    int current[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) current[i] = RowChoice(p, schedule, tile, first_row + 32 * i).current;
#pragma unroll 4
    for (int slot = 0; slot < schedule.slots; ++slot) {
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        RowChoice row = first;
        row.slots += 32 * i * p.route.row;
        row.current = current[i];
        bits[i] |= row.bits(schedule, slot);
      }
    }
    uint64_t any = 0;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) any |= bits[i];
    any = reduce_or(any);
    const uint64_t last = uint64_t(1) << (tile.steps - 1);

    mbarrier_wait(shared_address(&memory.chosen.empty[ring.slot()]), ring.phase() ^ 1);
    Choice& choice = memory.chosen.choices[ring.slot()];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) choice.rows[first_row + 32 * i] = bits[i];
    if (lane() == 0) choice.any[consumer] = (any & (last - 1)) | last;
    mbarrier_arrive(shared_address(&memory.chosen.full[ring.slot()]));
    ring.advance();
  }

  __device__ __forceinline__ void run() {
    for_each_tile<P>(p.shape, schedule, [&](const Tile& tile) { choose(tile); });
  }
};

}  // namespace moba::cuda::sm90::current
