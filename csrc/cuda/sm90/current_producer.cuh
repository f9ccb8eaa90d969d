// The producer warpgroup of the current-block kernel: one thread loads queries, keys and values by TMA, and for each
// consumer one warp gathers the partial results of its rows by cp.async.
#pragma once

#include "cuda/sm90/current_tile.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90::current {

template <int kHeadDim, Mode kMode>
struct Loader {
  using P = Plan<kHeadDim, kMode>;

  const CurrentParams& p;
  const Schedule& schedule;
  const CUtensorMap* map_q;
  const CUtensorMap* map_k;
  const CUtensorMap* map_v;
  typename P::Memory& memory;

  Ring<P::kQuerySlots> query;
  Ring<P::kKeySlots> key, value;

  // Rows beyond those of the unit arrive as zeros.
  template <int kTileKeys>
  __device__ __forceinline__ void load(const CUtensorMap* map, unsigned char* to, uint64_t* full, int row, int head,
                                       int group) {
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(to) + panel * (kTileKeys * kPanelRowBytes), map, shared_address(full),
                  panel * kPanelColumns, row, head, group);
    }
  }
  __device__ __forceinline__ void load_keys(int row, int head, int group) {
    mbarrier_wait(shared_address(&memory.key_empty[key.slot()]), key.phase() ^ 1);
    mbarrier_arrive_expect_tx(shared_address(&memory.key_full[key.slot()]), P::kKeyBytes);
    load<kKeys>(map_k, memory.keys[key.slot()], &memory.key_full[key.slot()], row, head, group);
    key.advance();
  }
  __device__ __forceinline__ void load_values(int row, int head, int group) {
    mbarrier_wait(shared_address(&memory.value_empty[value.slot()]), value.phase() ^ 1);
    mbarrier_arrive_expect_tx(shared_address(&memory.value_full[value.slot()]), P::kKeyBytes);
    load<kKeys>(map_v, memory.values[value.slot()], &memory.value_full[value.slot()], row, head, group);
    value.advance();
  }

  __device__ __forceinline__ void run() {
    for_each_tile<P::kTileRows>(p.shape, schedule, [&](const Tile& tile) {
      uint64_t* full = &memory.query_full[query.slot()];
      mbarrier_wait(shared_address(&memory.query_empty[query.slot()]), query.phase() ^ 1);
      memory.tiles[query.count % P::kTiles] = tile;
      mbarrier_arrive_expect_tx(shared_address(full), P::kConsumers * P::kQueryBytes);
      const int head = tile.unit % schedule.heads, group = tile.unit / schedule.heads;
      for (int i = 0; i < P::kConsumers; ++i) {
        load<kRows>(map_q, memory.queries[query.slot()][i], full, tile.row + i * kRows, head, group);
      }
      query.advance();
      // In the order of use: the values of a tile after the keys of the next.
      const int head_k = head / schedule.heads_per_key_head, first = tile.key_begin + tile.key;
      int step = tile.steps - 1;
      load_keys(first + step * kKeys, head_k, group);
      for (; step > 0; --step) {
        load_keys(first + (step - 1) * kKeys, head_k, group);
        load_values(first + step * kKeys, head_k, group);
      }
      load_values(first, head_k, group);
    });
    mbarrier_wait(shared_address(&memory.query_empty[query.slot()]), query.phase() ^ 1);
    memory.tiles[query.count % P::kTiles].steps = 0;
    mbarrier_arrive(shared_address(&memory.query_full[query.slot()]));
  }
};

// Where 16 bytes of a partial result lie in its row of a stage: two neighbouring rows are read at a time.
__device__ __forceinline__ int staged_part(int row, int part) { return part ^ ((row & 1) << 2); }

template <class T, int kHeadDim, Mode kMode>
struct Gatherer {
  using P = Plan<kHeadDim, kMode>;
  static constexpr int kParts = kHeadDim / 8;  // of 16 bytes, one a lane
  static constexpr int kRowsAtOnce = 32 / kParts;
  static constexpr unsigned kAll = 0xffffffffu;

  const CurrentParams& p;
  const Schedule& schedule;
  typename P::Memory& memory;
  int consumer;

  Ring<P::kStages> ring;

  // The slots of one row that hold a partial result, one after the other.
  struct Slots {
    const int32_t* positions;
    int next, end;
    __device__ __forceinline__ int take() {
      while (next < end) {
        const int position = __ldg(positions + next++);
        if (position >= 0) return position;
      }
      return kUnused;
    }
  };

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  // `half` of the rows, whose positions the lanes hold.
  __device__ __forceinline__ void copy_rows(Stage<kHeadDim>& stage, const char* from, int half, int position) {
    constexpr int kRowBytes = kHeadDim * 2, kAtOnce = 8;
    const int part = lane() % kParts;
    const uint32_t to = shared_address(stage.rows) + (half * 32 + lane() / kParts) * kRowBytes;
#pragma unroll 1
    for (int i0 = 0; i0 < kParts; i0 += kAtOnce) {
      int positions[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        positions[i] = __shfl_sync(kAll, position, (i0 + i) * kRowsAtOnce + lane() / kParts);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = (i0 + i) * kRowsAtOnce;
        cp_async_16(to + row * kRowBytes + staged_part(row + lane() / kParts, part) * 16,
                    from + static_cast<int64_t>(max(positions[i], 0)) * kRowBytes, positions[i] >= 0 ? 16 : 0);
      }
    }
  }

  // Of the rows of this consumer, one after the other.
  __device__ __forceinline__ const int32_t* positions_of(const Tile& tile) const {
    const int64_t row = (tile.unit - schedule.unit_begin) * p.shape.rows + tile.row + consumer * kRows;
    return p.lists.positions + row * schedule.slots;
  }
  __device__ __forceinline__ void prefetch_positions(const Tile& tile) const {
    constexpr int kLine = 128 / sizeof(int32_t);
    const int count = min(tile.rows - consumer * kRows, kRows) * schedule.slots;
    for (int i = lane() * kLine; i < count; i += 32 * kLine) prefetch_l2(positions_of(tile) + i);
  }

  __device__ __forceinline__ void gather(const Tile& tile) {
    const int local = tile.unit - schedule.unit_begin;
    const int64_t first_entry = local / schedule.heads_per_key_head * capacity(p.shape);
    const char* partials = static_cast<const char*>(p.partials.out) + first_entry * kHeadDim * 2 + lane() % kParts * 16;
    const float* lses = p.partials.lse + first_entry;
    Slots slots[2];
    int count[2];
    bool current[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 32 + lane();
      const bool exists = consumer * kRows + row < tile.rows;
      slots[half] = {positions_of(tile) + row * schedule.slots, 0, exists ? schedule.slots : 0};
      count[half] = 0;
      current[half] = !exists;
    }
#pragma unroll 4
    for (int slot = 0; slot < schedule.slots; ++slot) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = slot < slots[half].end ? __ldg(slots[half].positions + slot) : kUnused;
        current[half] = current[half] || position == kCurrent;
        count[half] += position >= 0;
      }
    }
    const int stages = __reduce_max_sync(kAll, max(count[0], count[1]));
    const uint32_t has_current[2] = {__ballot_sync(kAll, current[0]), __ballot_sync(kAll, current[1])};
    for (int i = 0; i < max(stages, 1); ++i) {
      int position[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) position[half] = slots[half].take();
      __syncwarp();
      Stage<kHeadDim>& stage = memory.past.stages[consumer][ring.slot()];
      const uint32_t full = shared_address(&memory.past.full[consumer][ring.slot()]);
      mbarrier_wait(shared_address(&memory.past.empty[consumer][ring.slot()]), ring.phase() ^ 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 32 + lane();
        if (position[half] >= 0) {
          cp_async_4(shared_address(stage.lse + row), lses + position[half]);
        } else {
          stage.lse[row] = -INFINITY;
        }
        if (lane() == 0) stage.has_current[half] = has_current[half];
      }
      if (lane() == 0) stage.stages = stages;
      if (stages > 0) {
        copy_rows(stage, partials, 0, position[0]);
        copy_rows(stage, partials, 1, position[1]);
      }
      cp_async_mbarrier_arrive(full);
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(full);
      ring.advance();
    }
  }

  __device__ __forceinline__ void run() {
    Tile next;
    next.rows = 0;
    for_each_tile<P::kTileRows>(p.shape, schedule, [&](const Tile& tile) {
      prefetch_positions(tile);
      if (next.rows > 0) gather(next);
      next = tile;
    });
    if (next.rows > 0) gather(next);
    cp_async_wait_all();
  }
};

}  // namespace moba::cuda::sm90::current
