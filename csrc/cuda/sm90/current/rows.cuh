// What a thread of a consumer keeps of its two rows: which keys they see, and the running output, maximum and sum.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/current/plan.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90::current {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// The keys from the begin of the row's block to its own position. Positions count from the begin of the sequence.
struct Visible {
  int begin[2], count[2];
  int first_end, last_begin;  // of the rows of the consumer

  __device__ __forceinline__ void set(int position, int row0, int block_size) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = position + row0 + 8 * i;
      begin[i] = max(own, 0) / block_size * block_size;
      count[i] = max(own + 1 - begin[i], 0);
    }
    first_end = position + 1;
    last_begin = max(position + kRows - 1, 0) / block_size * block_size;
  }
  // Rows that do not hold the bit see nothing.
  __device__ __forceinline__ void keep(const uint32_t (&bits)[kRows / 32], int row0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + 8 * i;
      if (!(bits[row / 32] >> row % 32 & 1)) count[i] = 0;
    }
    if ((bits[0] & bits[1]) != kAll) first_end = 0;
  }

  // Whether a row of the consumer does not see all keys of the tile at `key`.
  __device__ __forceinline__ bool masked(int key) const { return first_end < key + kKeys || last_begin > key; }
  __device__ __forceinline__ void mask(float (&scores)[kKeys / 2], int key) const {
    const int shift0 = key - begin[0] + 2 * (lane() % 4), shift1 = key - begin[1] + 2 * (lane() % 4);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int column = i / 4 * 8 + i % 2;
      const bool seen = i % 4 < 2 ? static_cast<unsigned>(shift0 + column) < static_cast<unsigned>(count[0])
                                  : static_cast<unsigned>(shift1 + column) < static_cast<unsigned>(count[1]);
      if (!seen) scores[i] = -INFINITY;
    }
  }
};

// The inverse of pack.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

// Word j of lane i of each four lanes becomes word i of lane j.
__device__ __forceinline__ void transpose(uint32_t (&words)[4]) {
  const bool odd = lane() & 1, high = lane() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kAll, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? other : words[i];
    words[i + 1] = odd ? words[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kAll, high ? words[i] : words[i + 2], 2);
    words[i] = high ? other : words[i];
    words[i + 2] = high ? words[i + 2] : other;
  }
}

template <int kHeadDim>
struct Rows {
  float out[kHeadDim / 2];
  // Of the unscaled scores, and over the columns of this thread; after finish() for powers of 2, and of whole rows.
  float largest[2], sum[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;
    largest[0] = largest[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // Scores become weights relative to the largest score so far; returns what to multiply earlier sums with. Weights of
  // a row that does not see these keys become 0, if the scores are finite.
  __device__ __forceinline__ float2 soften(float (&scores)[kKeys / 2], float scale, bool seen_a, bool seen_b) {
    float a = fmaxf(scores[0], scores[1]), b = fmaxf(scores[2], scores[3]);
#pragma unroll
    for (int i = 4; i < kKeys / 2; i += 4) {
      a = fmaxf(a, fmaxf(scores[i], scores[i + 1]));
      b = fmaxf(b, fmaxf(scores[i + 2], scores[i + 3]));
    }
    a = fmaxf(a, __shfl_xor_sync(kAll, a, 1));
    b = fmaxf(b, __shfl_xor_sync(kAll, b, 1));
    a = fmaxf(a, __shfl_xor_sync(kAll, a, 2));
    b = fmaxf(b, __shfl_xor_sync(kAll, b, 2));
    a = seen_a ? fmaxf(a, largest[0]) : largest[0];
    b = seen_b ? fmaxf(b, largest[1]) : largest[1];
    // -inf - -inf would be NaN.
    float base_a = finite_base(a) * scale, base_b = finite_base(b) * scale;
    const float2 shrink = make_float2(exp2_approximate(fmaf(largest[0], scale, -base_a)),
                                      exp2_approximate(fmaf(largest[1], scale, -base_b)));
    largest[0] = a;
    largest[1] = b;
    if (!seen_a) base_a = INFINITY;
    if (!seen_b) base_b = INFINITY;
    float sum_a = 0, sum_b = 0, more_a = 0, more_b = 0;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4) {
      scores[i] = exp2_approximate(fmaf(scores[i], scale, -base_a));
      scores[i + 1] = exp2_approximate(fmaf(scores[i + 1], scale, -base_a));
      scores[i + 2] = exp2_approximate(fmaf(scores[i + 2], scale, -base_b));
      scores[i + 3] = exp2_approximate(fmaf(scores[i + 3], scale, -base_b));
      sum_a += scores[i];
      more_a += scores[i + 1];
      sum_b += scores[i + 2];
      more_b += scores[i + 3];
    }
    sum[0] = sum[0] * shrink.x + (sum_a + more_a);
    sum[1] = sum[1] * shrink.y + (sum_b + more_b);
    return shrink;
  }

  __device__ __forceinline__ void rescale(float2 shrink) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i += 4) {
      out[i] *= shrink.x;
      out[i + 1] *= shrink.x;
      out[i + 2] *= shrink.y;
      out[i + 3] *= shrink.y;
    }
  }

  // After finish().
  __device__ __forceinline__ bool finite() const {
    float a = sum[0] * 0.f, b = sum[1] * 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i += 2) {
      a = fmaf(out[i], 0.f, a);
      b = fmaf(out[i + 1], 0.f, b);
    }
    return a + b == 0.f;
  }

  __device__ __forceinline__ void finish(float scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAll, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAll, sum[i], 2);
      largest[i] *= scale;
    }
  }

  // `row`: in the tile. Four lanes hold a row, and write 64 bytes of it at a time.
  template <class T>
  __device__ __forceinline__ void store(const CurrentParams& p, const Tile& tile, int row) const {
    T* to = unit_base<T>(p.out, tile.unit, p.shape.heads) + (tile.row + row) * p.out.row + lane() % 4 * 8;
    float* lse = unit_base<float>(p.lse, tile.unit, p.shape.heads) + tile.row + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = row + 8 * half < tile.rows;
      const float inverse = sum[half] == 0.f ? 0.f : 1.f / sum[half];
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = 4 * (4 * i + j) + 2 * half;
          words[j] = pack<T>(out[at] * inverse, out[at + 1] * inverse);
        }
        transpose(words);
        if (exists) {
          *reinterpret_cast<uint4*>(to + 8 * half * p.out.row + 32 * i) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      if (exists && lane() % 4 == 0) {
        lse[8 * half] = sum[half] == 0.f ? -INFINITY : (largest[half] + __log2f(sum[half])) * kLn2;
      }
    }
  }
};

}  // namespace moba::cuda::sm90::current
