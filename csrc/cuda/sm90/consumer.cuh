// A consumer warpgroup of the past kernel: gathers tiles of 64 queries into registers, multiplies them with the keys of
// a block, online softmax, times the values.
#pragma once

#include <utility>

#include "cuda/sm90/past.h"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90 {

constexpr float kLog2e = 1.4426950408889634f;

template <class T, int kHeadDim, int kKeys, bool kResident>
struct Consumer {
  using P = Plan<kHeadDim, kKeys, kResident>;
  static constexpr int kScores = kKeys / 2, kOut = kHeadDim / 2;
  static constexpr int kKeyPanel = kKeys * kPanelRowBytes;

  const PastParams& p;
  const Schedule& schedule;
  typename P::Memory& memory;
  float scale;  // of the scores, for powers of 2

  // Products: local variables of each tile, so that what one leaves behind takes no registers.
  using Queries = uint32_t[kHeadDim / 4];
  using Scores = float[kScores];
  using Out = float[kOut];
  using Weights = uint32_t[kScores / 2];

  // A thread loads 16 bytes at 8 j (j = lane % 4) of each 32 columns of its two rows: words 4 c + g of row_words.
  uint32_t row_words[2][kHeadDim / 8];
  float largest[2], sum[2];  // of this thread's two rows, of the unscaled scores; sums are over this thread's columns

  // What is left of a Tile.
  struct Work {
    int64_t first;
    int count, item, releases;
  };

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int row() const { return threadIdx.x % kWarpgroup / 32 * 16 + lane() / 4; }

  __device__ __forceinline__ void arrive(uint64_t* barrier, int count = 1) {
    if (lane() == 0) mbarrier_arrive(shared_address(barrier), count);
  }

  // Reads the next tile, and where its two rows for this thread are.
  __device__ __forceinline__ Work read_tile(Ring<P::kTileSlots>& ring, const char* (&rows)[2]) {
    const Tile& tile = memory.tiles[ring.slot];
    mbarrier_wait(shared_address(&memory.tile_full[ring.slot]), ring.phase);
    const Work work{tile.first, tile.count, tile.item, tile.releases};
    if (work.item >= 0) {
      const char* queries = static_cast<const char*>(tile.queries) + lane() % 4 * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t entry = tile.entry[row() + 8 * half];
        rows[half] = queries + static_cast<uint64_t>(entry & (kMaxRows - 1)) * schedule.row_bytes;
        if (schedule.group > 1) rows[half] += static_cast<int64_t>(entry >> kRowBits) * p.q.head * 2;
      }
    }
    __syncwarp();
    arrive(&memory.tile_empty[ring.slot]);
    ring.advance(P::kConsumers);
    return work;
  }

  __device__ __forceinline__ void load_queries(const char* const (&rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) {
        uint32_t* words = row_words[half] + 4 * c;
        load_once(words[0], words[1], words[2], words[3], rows[half] + 64 * c);
      }
    }
  }

  // Word j of lane i of each four lanes becomes word i of lane j.
  __device__ __forceinline__ void transpose(uint32_t* words) {
    const bool odd = lane() & 1, high = lane() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
      words[i] = odd ? other : words[i];
      words[i + 1] = odd ? words[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? words[i] : words[i + 2], 2);
      words[i] = high ? other : words[i];
      words[i + 2] = high ? words[i + 2] : other;
    }
  }
  // To the order of columns that keys have which nobody permuted.
  __device__ __forceinline__ void transpose_queries() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; i += 4) {
      transpose(row_words[0] + i);
      transpose(row_words[1] + i);
    }
  }

  // An operand of a product is four registers in a row, of which a load of 16 bytes fills other four. A plain copy the
  // compiler would put right behind the load, and wait there.
  __device__ __forceinline__ void take_queries(Queries& queries) {
    if constexpr (!kResident) transpose_queries();
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const uint32_t word = row_words[i % 2][i / 2];
      queries[i] = kResident ? opaque_xor(word, schedule.zero) : word;
    }
  }

  __device__ __forceinline__ void multiply_keys(Scores& scores, const Queries& queries, uint32_t keys) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const uint64_t columns = descriptor(keys + i / 4 * kKeyPanel + i % 4 * 32, 16);
      if (i == 0) {
        wgmma_registers_t_first<T>(scores, queries, columns, 0);
      } else {
        wgmma_registers_t<T>(scores, queries + 4 * i, columns, 1);
      }
    }
    wgmma_commit();
  }

  // The first kCount * 16 values of a tile.
  template <int kCount = kKeys / 16>
  __device__ __forceinline__ void multiply_values(Out& out, const Weights& weights, uint32_t values, bool accumulate) {
    wgmma_fence();
    if constexpr (kResident) {
      wgmma_registers_first<T>(out, weights, descriptor(values, kKeyPanel), 0);
    } else {
      wgmma_registers<T>(out, weights, descriptor(values, kKeyPanel), accumulate);
    }
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      wgmma_registers<T>(out, weights + 4 * i, descriptor(values + i * 16 * kPanelRowBytes, kKeyPanel), 1);
    }
    wgmma_commit();
  }
  // The last key tile of a block has `keys`, a multiple of 16. What lies beyond them in shared memory may be NaN, and is
  // not multiplied.
  template <int... kCounts>
  __device__ __forceinline__ void multiply_last_values(Out& out, const Weights& weights, uint32_t values, int keys,
                                                       std::integer_sequence<int, kCounts...>) {
    ((keys == 16 * (kCounts + 1) ? multiply_values<kCounts + 1>(out, weights, values, true) : void()), ...);
  }
  __device__ __forceinline__ void multiply_last_values(Out& out, const Weights& weights, uint32_t values, int keys) {
    if (keys == kKeys) {
      multiply_values(out, weights, values, true);
    } else {
      multiply_last_values(out, weights, values, keys, std::make_integer_sequence<int, kKeys / 16 - 1>());
    }
  }

  __device__ __forceinline__ void mask(Scores& scores, int keys) {
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      if (8 * i >= keys) {  // a multiple of 16
        scores[4 * i] = scores[4 * i + 1] = scores[4 * i + 2] = scores[4 * i + 3] = -INFINITY;
      }
    }
  }

  // Scores become weights relative to the largest score so far; returns what to multiply earlier sums with.
  __device__ __forceinline__ float2 soften(Scores& scores, bool first) {
    float a = fmaxf(scores[0], scores[1]), b = fmaxf(scores[2], scores[3]);
#pragma unroll
    for (int i = 1; i < kScores / 4; ++i) {
      a = fmaxf(a, fmaxf(scores[4 * i], scores[4 * i + 1]));
      b = fmaxf(b, fmaxf(scores[4 * i + 2], scores[4 * i + 3]));
    }
    a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
    b = fmaxf(b, __shfl_xor_sync(0xffffffffu, b, 1));
    a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
    b = fmaxf(b, __shfl_xor_sync(0xffffffffu, b, 2));
    float2 shrink = make_float2(0.f, 0.f);
    const float before_a = largest[0], before_b = largest[1];
    if (!first) {
      a = fmaxf(a, before_a);
      b = fmaxf(b, before_b);
    }
    largest[0] = a;
    largest[1] = b;
    // -inf - -inf would be NaN.
    const float base_a = a == -INFINITY ? 0.f : a * scale, base_b = b == -INFINITY ? 0.f : b * scale;
    if (!first) {
      shrink.x = exp2_approximate(before_a * scale - base_a);
      shrink.y = exp2_approximate(before_b * scale - base_b);
    }
    float sum_a = 0, sum_b = 0, more_a = 0, more_b = 0;
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      scores[4 * i] = exp2_approximate(fmaf(scores[4 * i], scale, -base_a));
      scores[4 * i + 1] = exp2_approximate(fmaf(scores[4 * i + 1], scale, -base_a));
      scores[4 * i + 2] = exp2_approximate(fmaf(scores[4 * i + 2], scale, -base_b));
      scores[4 * i + 3] = exp2_approximate(fmaf(scores[4 * i + 3], scale, -base_b));
      sum_a += scores[4 * i];
      more_a += scores[4 * i + 1];
      sum_b += scores[4 * i + 2];
      more_b += scores[4 * i + 3];
    }
    sum[0] = first ? sum_a + more_a : sum[0] * shrink.x + (sum_a + more_a);
    sum[1] = first ? sum_b + more_b : sum[1] * shrink.y + (sum_b + more_b);
    return shrink;
  }

  __device__ __forceinline__ void pack_weights(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ __forceinline__ void rescale(Out& out, float2 shrink) {
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      out[4 * i] *= shrink.x;
      out[4 * i + 1] *= shrink.x;
      out[4 * i + 2] *= shrink.y;
      out[4 * i + 3] *= shrink.y;
    }
  }

  // One of this thread's two rows: four lanes hold it, and write 64 bytes of it at a time.
  __device__ __forceinline__ void store(const Out& out, const Work& work) {
    char* to = static_cast<char*>(p.partials.out) + (work.first + row()) * (kHeadDim * 2) + lane() % 4 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = total == 0.f ? 0.f : __fdividef(1.f, total);  // 1 <= total, unless no key counts
      if (row() + 8 * half >= work.count) continue;
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) {
        uint32_t words[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const int at = 4 * (4 * c + g) + 2 * half;
          words[g] = pack<T>(out[at] * inverse, out[at + 1] * inverse);
        }
        store_streaming(to + 8 * half * (kHeadDim * 2) + 64 * c, words[0], words[1], words[2], words[3]);
      }
      if (lane() % 4 == 0) {
        const float base = largest[half] == -INFINITY ? 0.f : largest[half] * scale;
        p.partials.lse[work.first + row() + 8 * half] = base + __log2f(total);
      }
    }
  }

  __device__ __forceinline__ void run() {
    Ring<P::kTileSlots> tiles;
    tiles.advance(threadIdx.x / kWarpgroup - 1);
    const char* rows[2];
    Work work = read_tile(tiles, rows);
    if (work.item < 0) return;
    load_queries(rows);
    if constexpr (kResident) {
      run_resident(tiles, work);
    } else {
      run_streamed(tiles, work);
    }
  }

  __device__ __forceinline__ void run_resident(Ring<P::kTileSlots>& tiles, Work work) {
    const int keys = schedule.last_keys;
    for (;;) {
      Queries queries;
      Scores scores;
      Out out;
      Weights weights;
      const int slot = work.item % P::kKeySlots;
      const uint32_t phase = work.item / P::kKeySlots & 1;
      mbarrier_wait(shared_address(&memory.key_full[slot]), phase);
      take_queries(queries);
      multiply_keys(scores, queries, shared_address(memory.keys[slot]));
      const char* rows[2] = {nullptr, nullptr};
      const Work next = read_tile(tiles, rows);
      wgmma_wait<0>();
      settle(scores);
      if (next.item >= 0) load_queries(rows);
      if (work.releases) arrive(&memory.key_empty[slot], work.releases);
      if (keys < kKeys) mask(scores, keys);
      soften(scores, true);
      pack_weights(weights, scores);
      mbarrier_wait(shared_address(&memory.value_full[slot]), phase);
      multiply_last_values(out, weights, shared_address(memory.values[slot]), keys);
      wgmma_wait<0>();
      settle(out);
      if (work.releases) arrive(&memory.value_empty[slot], work.releases);
      store(out, work);
      if (next.item < 0) return;
      work = next;
    }
  }

  __device__ __forceinline__ void run_streamed(Ring<P::kTileSlots>& tiles, Work work) {
    Ring<P::kKeySlots> key;
    const int steps = schedule.steps, last_keys = schedule.last_keys;
    for (;;) {
      const char* rows[2] = {nullptr, nullptr};
      const Work next = read_tile(tiles, rows);
      if (work.count == 0) {
        for (int step = 0; step < steps; ++step, key.advance()) {
          mbarrier_wait(shared_address(&memory.key_full[key.slot]), key.phase);
          arrive(&memory.key_empty[key.slot]);
          mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
          arrive(&memory.value_empty[key.slot]);
        }
        if (next.item >= 0) load_queries(rows);
      } else {
        Queries queries;
        Scores scores;
        Out out;
        Weights weights;
        take_queries(queries);
        mbarrier_wait(shared_address(&memory.key_full[key.slot]), key.phase);
        multiply_keys(scores, queries, shared_address(memory.keys[key.slot]));
        wgmma_wait<0>();
        settle(scores);
        arrive(&memory.key_empty[key.slot]);
        soften(scores, true);
        pack_weights(weights, scores);
        bool accumulate = false;
#pragma unroll 1
        for (int step = 1; step < steps; ++step) {
          Ring<P::kKeySlots> after = key;
          after.advance();
          mbarrier_wait(shared_address(&memory.key_full[after.slot]), after.phase);
          mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
          multiply_keys(scores, queries, shared_address(memory.keys[after.slot]));
          multiply_values(out, weights, shared_address(memory.values[key.slot]), accumulate);
          wgmma_wait<1>();
          settle(scores);
          arrive(&memory.key_empty[after.slot]);
          if (step + 1 == steps && last_keys < kKeys) mask(scores, last_keys);
          const float2 shrink = soften(scores, false);
          wgmma_wait<0>();
          settle(out);
          settle(weights);
          arrive(&memory.value_empty[key.slot]);
          rescale(out, shrink);
          pack_weights(weights, scores);
          accumulate = true;
          key = after;
        }
        if (next.item >= 0) load_queries(rows);
        mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
        multiply_last_values(out, weights, shared_address(memory.values[key.slot]), last_keys);
        wgmma_wait<0>();
        settle(out);
        arrive(&memory.value_empty[key.slot]);
        key.advance();
        store(out, work);
      }
      if (next.item < 0) return;
      work = next;
    }
  }
};

}  // namespace moba::cuda::sm90
