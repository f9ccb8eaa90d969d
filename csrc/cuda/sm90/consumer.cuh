// A consumer warpgroup of the attend kernel: tiles of 64 queries times the keys of a block, online softmax, times the
// values.
#pragma once

#include "cuda/sm90/plan.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <class T, int kHeadDim, int kKeys, bool kResident>
struct Consumer {
  using P = Plan<kHeadDim, kKeys>;
  static constexpr int kScores = kKeys / 2, kOut = kHeadDim / 2;
  static constexpr int kKeyPanel = kKeys * kPanelRowBytes, kQueryPanel = kRows * kPanelRowBytes;

  const AttendParams& p;
  typename P::Memory& memory;
  float scale;  // of the scores, for powers of 2

  float scores[kScores], out[kOut];
  uint32_t weights[kScores / 2];
  float largest[2], sum[2];  // of this thread's two rows, of the unscaled scores; sums are over this thread's columns

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }

  __device__ __forceinline__ void arrive(uint64_t* barrier, int count = 1) {
    if (lane() == 0) mbarrier_arrive(shared_address(barrier), count);
  }

  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      wgmma_shared<T>(scores, descriptor(queries + i / 4 * kQueryPanel + i % 4 * 32, 16),
                      descriptor(keys + i / 4 * kKeyPanel + i % 4 * 32, 16), i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(uint32_t values, bool accumulate) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      wgmma_registers<T>(out, weights + 4 * i, descriptor(values + i * 16 * kPanelRowBytes, kKeyPanel),
                         i > 0 || accumulate);
    }
    wgmma_commit();
  }

  // visible: keys of this key tile that the two rows see, at least kKeys: all.
  __device__ __forceinline__ void mask(int visible0, int visible1) {
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const int column = 8 * i + 2 * (lane() % 4);
      if (column >= visible0) scores[4 * i] = -INFINITY;
      if (column + 1 >= visible0) scores[4 * i + 1] = -INFINITY;
      if (column >= visible1) scores[4 * i + 2] = -INFINITY;
      if (column + 1 >= visible1) scores[4 * i + 3] = -INFINITY;
    }
  }

  // Scores become weights relative to the largest score so far; returns what to multiply earlier sums with.
  __device__ __forceinline__ float2 soften(bool first) {
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

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ __forceinline__ void rescale(float2 shrink) {
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      out[4 * i] *= shrink.x;
      out[4 * i + 1] *= shrink.x;
      out[4 * i + 2] *= shrink.y;
      out[4 * i + 3] *= shrink.y;
    }
  }

  // Word j of lane i of each four lanes becomes word i of lane j.
  __device__ __forceinline__ void transpose(uint32_t (&words)[4]) {
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

  // One of this thread's two rows: four lanes hold it, and write 64 bytes of it at a time.
  template <int kHalf>
  __device__ __forceinline__ void store(int64_t local, int entry) {
    float total = sum[kHalf];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const float inverse = total == 0.f ? 0.f : __fdividef(1.f, total);  // 1 <= total, unless no key counts
    const int64_t index = local * p.shape.entries() + entry;
    T* to = static_cast<T*>(p.partial_out) + index * kHeadDim + lane() % 4 * 8;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * i + j) + 2 * kHalf;
        words[j] = pack<T>(out[at] * inverse, out[at + 1] * inverse);
      }
      transpose(words);
      if (entry >= 0) store_streaming(to + 32 * i, words[0], words[1], words[2], words[3]);
    }
    if (entry >= 0 && lane() % 4 == 0) {
      const float base = largest[kHalf] == -INFINITY ? 0.f : largest[kHalf] * scale;
      static_cast<float*>(p.partial_lse)[index] = (base + __log2f(total)) * kLn2;
    }
  }

  __device__ __forceinline__ int visible(const Tile& tile, int entry) const {
    if (!tile.masked || entry < 0) return tile.keys;
    return min(tile.keys, entry / static_cast<int>(p.shape.slots) + tile.shift);
  }

  __device__ __forceinline__ void run() {
    const int consumer = threadIdx.x / kWarpgroup - 1;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane() / 4;
#pragma unroll
    for (int i = 0; i < kScores; ++i) scores[i] = 0;
#pragma unroll
    for (int i = 0; i < kOut; ++i) out[i] = 0;
    Ring<P::kQuerySlots> query;
    query.advance(consumer);
    Ring<P::kKeySlots> key;
    for (;; query.advance(kConsumers)) {
      const Tile& tile = memory.tiles[query.slot];
      mbarrier_wait(shared_address(&memory.query_full[query.slot]), query.phase);
      const int steps = tile.steps, count = tile.count;
      if (steps == 0) return;
      fence_proxy_async();  // cp.async wrote what the products read
      if (!kResident && count == 0) {
        arrive(&memory.query_empty[query.slot]);
        for (int step = 0; step < steps; ++step, key.advance()) {
          mbarrier_wait(shared_address(&memory.key_full[key.slot]), key.phase);
          arrive(&memory.key_empty[key.slot]);
          mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
          arrive(&memory.value_empty[key.slot]);
        }
        continue;
      }
      const int64_t local = tile.local;
      const int entry0 = tile.entry[row], entry1 = tile.entry[row + 8];
      const int visible0 = visible(tile, entry0), visible1 = visible(tile, entry1);
      const int fewest = min(visible0, visible1);
      const int releases = kResident ? tile.releases : 1;
      if (kResident) {
        key.slot = tile.item % P::kKeySlots;
        key.phase = tile.item / P::kKeySlots & 1;
      }
      const uint32_t queries = shared_address(memory.queries[query.slot]);

      mbarrier_wait(shared_address(&memory.key_full[key.slot]), key.phase);
      multiply_keys(queries, shared_address(memory.keys[key.slot]));
      wgmma_wait<0>();
      settle(scores);
      if (releases) arrive(&memory.key_empty[key.slot], releases);
      if (kResident || steps == 1) arrive(&memory.query_empty[query.slot]);
      if (fewest < kKeys) mask(visible0, visible1);
      soften(true);
      pack_weights();
      bool accumulate = false;
      if constexpr (!kResident) {
        for (int step = 1; step < steps; ++step) {
          Ring<P::kKeySlots> next = key;
          next.advance();
          mbarrier_wait(shared_address(&memory.key_full[next.slot]), next.phase);
          mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
          multiply_keys(queries, shared_address(memory.keys[next.slot]));
          multiply_values(shared_address(memory.values[key.slot]), accumulate);
          wgmma_wait<1>();
          settle(scores);
          arrive(&memory.key_empty[next.slot]);
          if (step + 1 == steps) arrive(&memory.query_empty[query.slot]);
          if (fewest < (step + 1) * kKeys) mask(visible0 - step * kKeys, visible1 - step * kKeys);
          const float2 shrink = soften(false);
          wgmma_wait<0>();
          settle(out);
          settle(weights);
          arrive(&memory.value_empty[key.slot]);
          rescale(shrink);
          pack_weights();
          accumulate = true;
          key = next;
        }
      }
      mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
      multiply_values(shared_address(memory.values[key.slot]), accumulate);
      wgmma_wait<0>();
      settle(out);
      if (releases) arrive(&memory.value_empty[key.slot], releases);
      key.advance();
      store<0>(local, entry0);
      store<1>(local, entry1);
    }
  }
};

}  // namespace moba::cuda::sm90
