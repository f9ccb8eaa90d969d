// A consumer warpgroup of the past kernel: tiles of 64 queries times the keys of a block, online softmax, times the
// values. The scores of the next key tile, be it of the next query tile, are multiplied before the values of this one,
// so that the softmax runs beside a product.
#pragma once

#include "cuda/sm90/past/past.h"
#include "cuda/sm90/past/plan.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90 {

template <class T, int kHeadDim, int kKeys, bool kResident>
struct Consumer {
  using P = Plan<kHeadDim, kKeys, kResident>;
  static constexpr int kScores = kKeys / 2, kOut = kHeadDim / 2;
  static constexpr int kKeyPanel = kKeys * kPanelRowBytes, kQueryPanel = kRows * kPanelRowBytes;

  const PastParams& p;
  const Schedule& schedule;
  typename P::Memory& memory;
  float scale;  // of the scores, for powers of 2

  // Products: local variables, so that what one leaves behind takes no registers.
  using Scores = float[kScores];
  using Out = float[kOut];
  using Weights = uint32_t[kScores / 2];

  // Of this thread's two rows.
  struct Softmax {
    float largest[2];  // unscaled score
    float sum[2];      // over this thread's columns
  };

  // What is left of a Tile.
  struct Work {
    int64_t first;
    int count, item, releases;
  };

  Ring<P::kTileSlots> tiles;
  Ring<P::kQuerySlots> queries;

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int row() const { return threadIdx.x % kWarpgroup / 32 * 16 + lane() / 4; }

  // For all lanes, which are done with what it hands back: after a __syncwarp.
  __device__ __forceinline__ void arrive(uint64_t* barrier, int count = 1) {
    if (lane() == 0) mbarrier_arrive(shared_address(barrier), count);
  }

  // Waits for this consumer's next tile, whose queries are then in the slot of `queries`.
  __device__ __forceinline__ Work take_tile() {
    mbarrier_wait(shared_address(&memory.query_full[queries.slot]), queries.phase);
    const Tile& tile = memory.tiles[tiles.slot];
    const Work work{tile.first, tile.count, tile.item, tile.releases};
    __syncwarp();
    arrive(&memory.tile_empty[tiles.slot]);
    tiles.advance(P::kConsumers);
    fence_proxy_async();  // cp.async wrote what the products read
    return work;
  }
  __device__ __forceinline__ void release_queries() {
    arrive(&memory.query_empty[queries.slot]);
    queries.advance(P::kConsumers);
  }

  // Descriptors of an operand in shared memory. From an address that the compiler knows to be the same for all lanes it
  // makes them in uniform registers, in fewer instructions; streamed blocks were slower so.
  struct Operand {
    uint32_t address, stride;
    uint64_t first;

    __device__ __forceinline__ Operand(uint32_t address, uint32_t stride)
        : address(address),
          stride(stride),
          first(descriptor(kResident ? __shfl_sync(0xffffffffu, address, 0) : address, stride)) {}
    __device__ __forceinline__ uint64_t at(int bytes) const {
      return kResident ? moved(first, bytes) : descriptor(address + bytes, stride);
    }
  };

  __device__ __forceinline__ void multiply_keys(Scores& scores, uint32_t rows, uint32_t keys) {
    const Operand a(rows, 16), b(keys, 16);
    wgmma_fence();
    wgmma_shared_first<T>(scores, a.at(0), b.at(0), 0);
#pragma unroll
    for (int i = 1; i < kHeadDim / 16; ++i) {
      wgmma_shared<T>(scores, a.at(i / 4 * kQueryPanel + i % 4 * 32), b.at(i / 4 * kKeyPanel + i % 4 * 32), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(Out& out, const Weights& weights, uint32_t values, bool accumulate) {
    const Operand b(values, kKeyPanel);
    wgmma_fence();
    if constexpr (kResident) {
      wgmma_registers_first<T>(out, weights, b.at(0), 0);
    } else {
      wgmma_registers<T>(out, weights, b.at(0), accumulate);
    }
#pragma unroll
    for (int i = 1; i < kKeys / 16; ++i) wgmma_registers<T>(out, weights + 4 * i, b.at(i * 16 * kPanelRowBytes), 1);
    wgmma_commit();
  }

  // keys: a multiple of 16.
  __device__ __forceinline__ void mask(Scores& scores, int keys) {
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      if (8 * i >= keys) {
        scores[4 * i] = scores[4 * i + 1] = scores[4 * i + 2] = scores[4 * i + 3] = -INFINITY;
      }
    }
  }

  // Scores become weights relative to the largest score so far; returns what to multiply earlier sums with.
  __device__ __forceinline__ float2 soften(Scores& scores, Softmax& softmax, bool first) {
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
    const float before_a = softmax.largest[0], before_b = softmax.largest[1];
    if (!first) {
      a = fmaxf(a, before_a);
      b = fmaxf(b, before_b);
    }
    softmax.largest[0] = a;
    softmax.largest[1] = b;
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
    softmax.sum[0] = first ? sum_a + more_a : softmax.sum[0] * shrink.x + (sum_a + more_a);
    softmax.sum[1] = first ? sum_b + more_b : softmax.sum[1] * shrink.y + (sum_b + more_b);
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

  // A warp's 16 rows lie together in the partials, so that one copy takes them there.
  __device__ __forceinline__ void store(const Out& out, const Softmax& softmax, const Work& work) {
    const int warp = threadIdx.x / 32 - 4, warp_row = warp % 4 * 16;
    const uint32_t results = shared_address(memory.results[warp]);
    if (lane() == 0) bulk_wait_read();
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = softmax.sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = total == 0.f ? 0.f : __fdividef(1.f, total);  // 1 <= total, unless no key counts
      const uint32_t to = results + (lane() / 4 + 8 * half) * (kHeadDim * 2) + lane() % 4 * 16;
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) {
        uint32_t words[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const int at = 4 * (4 * c + g) + 2 * half;
          words[g] = pack<T>(out[at] * inverse, out[at + 1] * inverse);
        }
        shared_store_16(to + 64 * c, words[0], words[1], words[2], words[3]);
      }
      if (lane() % 4 == 0 && row() + 8 * half < work.count) {
        const float base = softmax.largest[half] == -INFINITY ? 0.f : softmax.largest[half] * scale;
        p.partials.lse[work.first + row() + 8 * half] = base + __log2f(total);
      }
    }
    fence_proxy_async();
    __syncwarp();
    const int rows = min(16, work.count - warp_row);
    if (lane() == 0 && rows > 0) {
      bulk_store_streaming(static_cast<char*>(p.partials.out) + (work.first + warp_row) * (kHeadDim * 2), results,
                           rows * kHeadDim * 2);
    }
  }

  // Where keys and values are, by the barriers that tell that they are there.
  using KeyRing = Ring<P::kFullBarriers>;
  __device__ __forceinline__ static int slot(const KeyRing& key) { return key.slot % P::kKeySlots; }
  // Those of a resident block.
  __device__ __forceinline__ KeyRing ring_of(const Work& work) const {
    return {work.item % P::kFullBarriers, static_cast<uint32_t>(work.item / P::kFullBarriers & 1)};
  }

  // Scores of the queries in the slot and the keys in `key`.
  __device__ __forceinline__ void start_scores(Scores& scores, const KeyRing& key) {
    mbarrier_wait(shared_address(&memory.key_full[key.slot]), key.phase);
    multiply_keys(scores, shared_address(memory.queries[queries.slot]), shared_address(memory.keys[slot(key)]));
  }
  __device__ __forceinline__ void end_scores(Scores& scores, const KeyRing& key, int releases, bool last) {
    settle(scores);
    __syncwarp();
    if (releases) arrive(&memory.key_empty[slot(key)], releases);
    if (last) {
      release_queries();
      if (schedule.last_keys < kKeys) mask(scores, schedule.last_keys);
    }
  }

  __device__ __forceinline__ void run() {
    tiles.advance(threadIdx.x / kWarpgroup - 1);
    queries.advance(threadIdx.x / kWarpgroup - 1);
    Work work = take_tile();
    if (work.item < 0) return;
    const int steps = kResident ? 1 : schedule.steps;
    int step = 0;  // of the key tile whose weights wait for their product
    KeyRing key;
    if (kResident) key = ring_of(work);
    Softmax softmax;
    Out out;
    Weights weights;
    {
      Scores scores;
      start_scores(scores, key);
      wgmma_wait<0>();
      end_scores(scores, key, kResident ? work.releases : 1, steps == 1);
      soften(scores, softmax, true);
      pack_weights(weights, scores);
    }
    for (;;) {
      const bool last = kResident || step + 1 == steps;
      Work next = work;
      if (last) {
        next = take_tile();
        if (next.item < 0) break;
      }
      KeyRing after = key;
      if (kResident) {
        after = ring_of(next);
      } else {
        after.advance();
      }
      Scores scores;
      start_scores(scores, after);
      mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
      multiply_values(out, weights, shared_address(memory.values[slot(key)]), step > 0);
      wgmma_wait<1>();
      const int next_step = last ? 0 : step + 1;
      end_scores(scores, after, kResident ? next.releases : 1, kResident || next_step + 1 == steps);
      const Softmax before = softmax;
      const float2 shrink = soften(scores, softmax, last);
      wgmma_wait<0>();
      settle(out);
      settle(weights);
      __syncwarp();
      if (!kResident || work.releases) arrive(&memory.value_empty[slot(key)], kResident ? work.releases : 1);
      if (last) {
        store(out, before, work);
      } else {
        rescale(out, shrink);
      }
      pack_weights(weights, scores);
      work = next;
      key = after;
      step = next_step;
    }
    mbarrier_wait(shared_address(&memory.value_full[key.slot]), key.phase);
    multiply_values(out, weights, shared_address(memory.values[slot(key)]), step > 0);
    wgmma_wait<0>();
    settle(out);
    store(out, softmax, work);
    if (lane() == 0) bulk_wait();
  }
};

}  // namespace moba::cuda::sm90
