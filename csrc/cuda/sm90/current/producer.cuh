// The producers of the current-block kernel: one thread loads queries, keys and values by TMA, and for each
// consumer two warps gather the partial results of its rows by cp.async.
#pragma once

#include "cuda/sm90/current/merge.cuh"
#include "cuda/sm90/current/tile.cuh"
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
  Ring<kChoices> choice;

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

  // The gathering warps look them up one after the other.
  __device__ __forceinline__ void prefetch_positions(const Tile& tile) const {
    const int64_t row = (tile.unit - schedule.unit_begin) * p.shape.rows + tile.row;
    const uintptr_t from = reinterpret_cast<uintptr_t>(p.lists.positions + row * schedule.slots);
    const int bytes = (tile.rows * schedule.slots * static_cast<int>(sizeof(int32_t)) + from % 16) & ~15;
    if (bytes > 0) bulk_prefetch_l2(reinterpret_cast<const void*>(from & ~uintptr_t(15)), bytes);
  }

  __device__ __forceinline__ KeyTiles<P::kMasked> key_tiles(const Tile& tile) {
    if constexpr (P::kMasked) {
      mbarrier_wait(shared_address(&memory.chosen.full[choice.slot()]), choice.phase());
      const uint64_t(&any)[2] = memory.chosen.choices[choice.slot()].any;
      const uint64_t chosen = any[0] | any[1];
      mbarrier_arrive(shared_address(&memory.chosen.empty[choice.slot()]));
      choice.advance();
      return KeyTiles<true>(chosen);
    } else {
      return KeyTiles<false>(tile);
    }
  }

  __device__ __forceinline__ void run() {
    for_each_tile<P>(p.shape, schedule, [&](const Tile& tile) {
      if (P::kPast) prefetch_positions(tile);
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
      const int head_k = head / schedule.heads_per_key_head;
      load_keys(tile.key_begin + tile.key + (tile.steps - 1) * kKeys, head_k, group);
      KeyTiles<P::kMasked> tiles = key_tiles(tile);
      while (tiles.more()) {
        const int before = tiles.key;
        tiles.next();
        load_keys(tile.key_begin + tiles.key, head_k, group);
        load_values(tile.key_begin + before, head_k, group);
      }
      load_values(tile.key_begin + tiles.key, head_k, group);
    });
    mbarrier_wait(shared_address(&memory.query_empty[query.slot()]), query.phase() ^ 1);
    memory.tiles[query.count % P::kTiles].steps = 0;
    mbarrier_arrive(shared_address(&memory.query_full[query.slot()]));
  }
};

// One warp: half of the rows of a consumer.
template <class T, int kHeadDim, Mode kMode>
struct Gatherer {
  using P = Plan<kHeadDim, kMode>;
  static constexpr int kRowBytes = kHeadDim * 2, kParts = kRowBytes / 16;  // a part a lane
  static constexpr int kRowsAtOnce = 32 / kParts, kAtOnce = kParts / 2;

  const CurrentParams& p;
  const Schedule& schedule;
  typename P::Memory& memory;
  int consumer, half;

  Ring<P::kStages> ring;

  // Of the rows of the consumer, one after the other.
  __device__ __forceinline__ const int32_t* positions_of(const Tile& tile) const {
    const int64_t row = (tile.unit - schedule.unit_begin) * p.shape.rows + tile.row + consumer * kRows;
    return p.lists.positions + row * schedule.slots;
  }

  // Each lane holds the position of a row; a row is copied by kParts lanes.
  __device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int position) {
    const int part = lane() % kParts;
#pragma unroll 1
    for (int row0 = lane() / kParts; row0 < kGatherRows; row0 += kAtOnce * kRowsAtOnce) {
      int positions[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) positions[i] = __shfl_sync(kAll, position, row0 + i * kRowsAtOnce);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = row0 + i * kRowsAtOnce;
        cp_async_16_or_zero(to + row * kRowBytes + staged_part(row, part) * 16, from, positions[i], kRowBytes);
      }
    }
  }

  __device__ __forceinline__ void gather(const Tile& tile) {
    const int64_t first_entry = (tile.unit - schedule.unit_begin) / schedule.heads_per_key_head * capacity(p.shape);
    const char* partials = static_cast<const char*>(p.partials.out) + first_entry * kRowBytes + lane() % kParts * 16;
    const float* lses = p.partials.lse + first_entry;
    // A lane looks up one row of this half, and counts in the other half too, as a consumer has one number of stages.
    const int row = half * kGatherRows + lane(), other = row ^ kGatherRows;
    const int rows = tile.rows - consumer * kRows;
    const int32_t* positions = positions_of(tile) + row * schedule.slots;
    const int32_t* other_positions = positions_of(tile) + other * schedule.slots;
    int count = 0, other_count = 0;
    bool current = row >= rows;
#pragma unroll 4
    for (int slot = 0; slot < schedule.slots; ++slot) {
      const int position = row < rows ? __ldg(positions + slot) : kUnused;
      current = current || position == kCurrent;
      count += position >= 0;
      other_count += other < rows && __ldg(other_positions + slot) >= 0;
    }
    const int stages = __reduce_max_sync(kAll, max(count, other_count));
    const uint32_t has_current = __ballot_sync(kAll, current);
    int slot = row < rows ? 0 : schedule.slots;
    for (int i = 0; i < max(stages, 1); ++i) {
      int position = kUnused;
      while (position < 0 && slot < schedule.slots) position = __ldg(positions + slot++);
      __syncwarp();
      Stage<kHeadDim>& stage = memory.past.stages[consumer][ring.slot()];
      const uint32_t full = shared_address(&memory.past.full[consumer][ring.slot()]);
      mbarrier_wait(shared_address(&memory.past.empty[consumer][ring.slot()]), ring.phase() ^ 1);
      if (position >= 0) {
        cp_async_4(shared_address(stage.lse + row), lses + position);
      } else {
        stage.lse[row] = -INFINITY;
      }
      if (lane() == 0) {
        stage.has_current[half] = has_current;
        stage.stages = stages;
      }
      if (stages > 0) {
        copy_rows(shared_address(stage.rows) + half * kGatherRows * kRowBytes, partials, position);
      }
      cp_async_mbarrier_arrive(full);
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(full);
      ring.advance();
    }
  }

  __device__ __forceinline__ void run() {
    for_each_tile<P>(p.shape, schedule, [&](const Tile& tile) { gather(tile); });
    cp_async_wait_all();
  }
};

}  // namespace moba::cuda::sm90::current
