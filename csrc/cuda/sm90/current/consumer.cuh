// A consumer warpgroup of the current-block kernel: 64 queries times the keys of their blocks, from the last key tile
// to the first, with an online softmax; the scores of a tile are computed while the values of the one before are
// multiplied, and the two consumers take turns at the tensor cores.
#pragma once

#include "cuda/sm90/current/current.h"
#include "cuda/sm90/current/exact.cuh"
#include "cuda/sm90/current/merge.cuh"
#include "cuda/sm90/current/plan.h"
#include "cuda/sm90/current/repair.cuh"
#include "cuda/sm90/current/rows.cuh"
#include "cuda/sm90/current/tile.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90::current {

template <class T, int kHeadDim, Mode kMode>
struct Consumer {
  using P = Plan<kHeadDim, kMode>;
  static constexpr bool kPast = P::kPast, kMasked = P::kMasked;
  static constexpr int kScores = kKeys / 2;
  static constexpr int kKeyPanel = kKeys * kPanelRowBytes, kQueryPanel = kRows * kPanelRowBytes;

  const CurrentParams& p;
  const Schedule& schedule;
  typename P::Memory& memory;
  int consumer;
  float scale;  // of the scores, for powers of 2

  float scores[kScores];
  uint32_t weights[kScores / 2];
  Rows<kHeadDim> rows;
  Visible visible;
  Ring<P::kQuerySlots> query;
  Ring<P::kKeySlots> key, value;
  Ring<P::kStages> stage;
  Ring<kChoices> choice;
  uint64_t chosen[2];  // key tiles of this thread's rows

  // For the warp: what its products have read may be loaded anew.
  __device__ __forceinline__ void arrive(uint64_t* barrier) {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared_address(barrier));
  }
  // Each for itself: what it has read may be written.
  __device__ __forceinline__ void arrive_all(uint64_t* barrier) { mbarrier_arrive(shared_address(barrier)); }

  __device__ __forceinline__ void multiply_keys(uint32_t queries) {
    const uint64_t rows = descriptor(queries, 16);
    const uint64_t columns = descriptor(shared_address(memory.keys[key.slot()]), 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      wgmma_shared<T>(scores, moved(rows, i / 4 * kQueryPanel + i % 4 * 32),
                      moved(columns, i / 4 * kKeyPanel + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void multiply_values() {
    const uint64_t values = descriptor(shared_address(memory.values[value.slot()]), kKeyPanel);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      wgmma_registers<T>(rows.out, weights + 4 * i, moved(values, i * 16 * kPanelRowBytes), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // Whether values hold a NaN or an infinity, which a weight of 0 would not mask.
  __device__ __forceinline__ bool any_not_finite() {
    const bool here = not_finite<T>(memory.values[value.slot()], threadIdx.x % kWarpgroup, P::kKeyBytes);
    return named_barrier_any(kValuesBarrier + consumer, kWarpgroup, here);
  }

  __device__ __forceinline__ uint32_t queries() const { return shared_address(memory.queries[query.slot()][consumer]); }
  __device__ __forceinline__ const Tile& next_tile() {
    mbarrier_wait(shared_address(&memory.query_full[query.slot()]), query.phase());
    return memory.tiles[query.count % P::kTiles];
  }
  // The scores of the last key tile; without a tile, of whatever lies there, as a product must not depend on a branch.
  __device__ __forceinline__ void start(bool exists) {
    if (exists) mbarrier_wait(shared_address(&memory.key_full[key.slot()]), key.phase());
    multiply_keys(queries());
  }

  // Whether one of this thread's rows chose the key tile.
  __device__ __forceinline__ bool sees(int half, int key) const {
    return !kMasked || (chosen[half] >> (key / kKeys) & 1) != 0;
  }
  __device__ __forceinline__ float2 soften(int key, bool masked) {
    if (masked) visible.mask(scores, key);
    return rows.soften(scores, scale, sees(0, key), sees(1, key));
  }

  // Begins with the scores of the last key tile under way.
  __device__ __forceinline__ void attend(KeyTiles<kMasked> tiles) {
    const bool turns = tiles.at_least(kTurnSteps);
    wgmma_wait<0>();
    settle(scores);
    rows.clear();
    arrive(&memory.key_empty[key.slot()]);
    key.advance();
    if (!tiles.more()) arrive_all(&memory.query_empty[query.slot()]);
    bool masked = visible.masked(tiles.key);
    soften(tiles.key, masked);
    pack_weights();
    while (tiles.more()) {
      bool exactly = false;
      if (!kMasked && masked) {
        mbarrier_wait(shared_address(&memory.value_full[value.slot()]), value.phase());
        exactly = any_not_finite();
        if (exactly) {
          multiply_exactly<T>(rows.out, weights, memory.values[value.slot()], visible, tiles.key);
        }
      }
      mbarrier_wait(shared_address(&memory.key_full[key.slot()]), key.phase());
      if (turns) named_barrier_sync(kTurnBarrier + consumer, 2 * kWarpgroup);
      multiply_keys(queries());
      if (exactly) {
        if (turns) named_barrier_arrive(kTurnBarrier + (consumer + 1) % P::kConsumers, 2 * kWarpgroup);
        wgmma_wait<0>();
      } else {
        mbarrier_wait(shared_address(&memory.value_full[value.slot()]), value.phase());
        multiply_values();
        if (turns) named_barrier_arrive(kTurnBarrier + (consumer + 1) % P::kConsumers, 2 * kWarpgroup);
        wgmma_wait<1>();
      }
      settle(scores);
      arrive(&memory.key_empty[key.slot()]);
      key.advance();
      tiles.next();
      if (!tiles.more()) arrive_all(&memory.query_empty[query.slot()]);
      masked = visible.masked(tiles.key);
      const float2 shrink = soften(tiles.key, masked);
      wgmma_wait<0>();
      settle(rows.out);
      settle(weights);
      arrive(&memory.value_empty[value.slot()]);
      value.advance();
      rows.rescale(shrink);
      pack_weights();
    }
    mbarrier_wait(shared_address(&memory.value_full[value.slot()]), value.phase());
    if (!kMasked && masked && any_not_finite()) {
      multiply_exactly<T>(rows.out, weights, memory.values[value.slot()], visible, tiles.key);
    } else {
      multiply_values();
      wgmma_wait<0>();
      settle(rows.out);
    }
    arrive(&memory.value_empty[value.slot()]);
    value.advance();
  }

  __device__ __forceinline__ void run() {
    // The first scores of the next tile are under way while this one is written. With partial results to merge there is
    // no place for the queries of a second tile, and the tensor cores have time.
    constexpr bool kAhead = !kPast;
    if (consumer == P::kConsumers - 1) named_barrier_arrive(kTurnBarrier, 2 * kWarpgroup);
    const int row0 = threadIdx.x % kWarpgroup / 32 * 16 + lane() / 4;
#pragma unroll
    for (int i = 0; i < kScores; ++i) scores[i] = 0;
    const Tile* tile = &next_tile();
    if (kAhead) start(tile->steps > 0);
    bool finite = true;
    while (tile->steps > 0) {
      visible.set(tile->position + consumer * kRows, row0, schedule.block_size);
      if constexpr (kPast) {
        mbarrier_wait(shared_address(&memory.past.full[consumer][stage.slot()]), stage.phase());
        visible.keep(memory.past.stages[consumer][stage.slot()].has_current, row0);
      }
      if (!kAhead) start(true);
      if constexpr (kMasked) {
        attend(KeyTiles<true>(choose(row0)));
      } else {
        attend(KeyTiles<false>(*tile));
      }
      query.advance();
      const Tile* next = nullptr;
      if constexpr (kAhead) {
        next = &next_tile();
        start(next->steps > 0);
      }
      rows.finish(scale);
      if constexpr (kPast) merge(row0);
      if (kMasked) finite = finite && rows.finite();
      rows.template store<T>(p, *tile, consumer * kRows + row0);
      tile = kAhead ? next : &next_tile();
    }
    wgmma_wait<0>();
    if constexpr (kMasked) {
      if (!__all_sync(kAll, finite)) {
        const int first_row = consumer * kRows + static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;
        const Repair<T, kHeadDim> repair{p, schedule, first_row, scale};
        repair.run();
      }
    }
  }

  // The key tiles that any row chose.
  __device__ __forceinline__ uint64_t choose(int row0) {
    mbarrier_wait(shared_address(&memory.chosen.full[choice.slot()]), choice.phase());
    const Choice& of_tile = memory.chosen.choices[choice.slot()];
    chosen[0] = of_tile.rows[consumer * kRows + row0];
    chosen[1] = of_tile.rows[consumer * kRows + row0 + 8];
    const uint64_t any = of_tile.any[0] | of_tile.any[1];
    arrive_all(&memory.chosen.empty[choice.slot()]);
    choice.advance();
    return any;
  }

  __device__ __forceinline__ void merge(int row0) {
    const int stages = memory.past.stages[consumer][stage.slot()].stages;
    for (int i = 0; i < max(stages, 1); ++i) {
      mbarrier_wait(shared_address(&memory.past.full[consumer][stage.slot()]), stage.phase());
      if (stages > 0) merge_stage<T>(rows, memory.past.stages[consumer][stage.slot()], row0);
      arrive_all(&memory.past.empty[consumer][stage.slot()]);
      stage.advance();
    }
  }
};

}  // namespace moba::cuda::sm90::current
