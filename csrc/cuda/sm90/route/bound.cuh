// A lower bound of the k-th best score of a row, from registers: the k-th largest of the maxima of 32 classes of
// columns, as k different scores reach it. Two rows at a time in pairs of f16, rounded towards zero; four lanes share
// a row. f16 and not bf16: where the scores of a row have much in common, as in a text that stays with its topics, bf16
// tells too few of them apart. Numbers beyond f16 become its largest one: the bound of rows full of them excludes
// little.
#pragma once

#include <cstdint>

namespace moba::cuda::sm90 {

// A pair of f16, the first number in the low half.
__device__ __forceinline__ uint32_t truncated(float first, float second) {
  uint32_t pair;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}
__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("min.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}
constexpr uint32_t kMinusInfinities = 0xfc00fc00u;

// No number that was truncated to this one is below.
__device__ __forceinline__ float lower_bound(uint32_t f16) {
  const bool exact = f16 == 0xfc00u || (f16 & 0x8000u) == 0;  // minus infinity, or rounded down
  const uint16_t bits = static_cast<uint16_t>(exact ? f16 : f16 + 1);
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}

__device__ __forceinline__ void order(uint32_t& first, uint32_t& second) {
  const uint32_t a = first, b = second;
  first = larger(a, b);
  second = smaller(a, b);
}

// A bitonic sequence becomes descending.
template <int kCount>
__device__ __forceinline__ void sort_bitonic(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int distance = kCount / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((i & distance) == 0) order(x[i], x[i + distance]);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void sort(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int run = 2; run <= kCount; run *= 2) {
#pragma unroll
    for (int distance = run / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if ((i & distance) != 0) continue;
        if ((i & run) == 0) {
          order(x[i], x[i + distance]);
        } else {
          order(x[i + distance], x[i]);
        }
      }
    }
  }
}

// The largest kCount of two descending lists: those of this lane and of lane ^ offset. Bitonic.
template <int kCount>
__device__ __forceinline__ void take_larger(uint32_t (&x)[kCount], int offset) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const uint32_t low = __shfl_xor_sync(0xffffffffu, x[i], offset);
    const uint32_t high = __shfl_xor_sync(0xffffffffu, x[kCount - 1 - i], offset);
    x[i] = larger(x[i], high);
    x[kCount - 1 - i] = larger(x[kCount - 1 - i], low);
  }
}

// The count-th largest of the pairs that four lanes hold, 8 each; count <= kKept.
template <int kKept>
__device__ __forceinline__ uint32_t largest_of_quad(const uint32_t (&pairs)[8], int count) {
  static_assert(kKept == 2 || kKept == 8 || kKept == 16);
  uint32_t own[8], best[kKept];
#pragma unroll
  for (int i = 0; i < 8; ++i) own[i] = pairs[i];
  sort(own);
  if constexpr (kKept == 16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      best[i] = own[i];
      best[15 - i] = __shfl_xor_sync(0xffffffffu, own[i], 1);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kKept; ++i) best[i] = own[i];
    take_larger(best, 1);
  }
  sort_bitonic(best);
  take_larger(best, 2);
  sort_bitonic(best);
  // best[count - 1], without an array in memory.
#pragma unroll
  for (int distance = kKept / 2; distance > 0; distance /= 2) {
    const bool upper = ((count - 1) & distance) != 0;
#pragma unroll
    for (int i = 0; i < kKept / 2; ++i) {
      if (i < distance) best[i] = upper ? best[i + distance] : best[i];
    }
  }
  return best[0];
}

}  // namespace moba::cuda::sm90
