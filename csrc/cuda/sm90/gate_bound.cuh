// A lower bound of the k-th best score of a row, from registers: the k-th largest of the maxima of 32 classes of
// columns, as k different scores reach it. Sorting networks on numbers alone; four lanes share a row.
#pragma once

#include <cstdint>

namespace moba::cuda::sm90 {

__device__ __forceinline__ void order(float& larger, float& smaller) {
  const float a = larger, b = smaller;
  larger = fmaxf(a, b);
  smaller = fminf(a, b);
}

// A bitonic sequence becomes descending.
template <int kCount>
__device__ __forceinline__ void sort_bitonic(float (&x)[kCount]) {
#pragma unroll
  for (int distance = kCount / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((i & distance) == 0) order(x[i], x[i + distance]);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void sort(float (&x)[kCount]) {
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
__device__ __forceinline__ void take_larger(float (&x)[kCount], int offset) {
  float other[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) other[i] = __shfl_xor_sync(0xffffffffu, x[i], offset);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = fmaxf(x[i], other[kCount - 1 - i]);
}

template <int kCount>
__device__ __forceinline__ float pick(const float (&x)[kCount], int index) {
  float picked = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) picked = index == i ? x[i] : picked;
  return picked;
}

// The count-th largest of the maxima that four lanes hold, 8 each; count <= kKept.
template <int kKept>
__device__ __forceinline__ float largest_of_quad(const float (&unsorted)[8], int count) {
  static_assert(kKept == 2 || kKept == 8 || kKept == 16);
  float maxima[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) maxima[i] = unsorted[i];
  sort(maxima);
  float best[kKept];
  if constexpr (kKept == 16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      best[i] = maxima[i];
      best[15 - i] = __shfl_xor_sync(0xffffffffu, maxima[i], 1);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kKept; ++i) best[i] = maxima[i];
    take_larger(best, 1);
  }
  sort_bitonic(best);
  take_larger(best, 2);
  sort_bitonic(best);
  return pick(best, count - 1);
}

}  // namespace moba::cuda::sm90
