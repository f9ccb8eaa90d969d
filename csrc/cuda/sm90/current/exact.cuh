// Products in which a masked value does not count at all.
//
// A masked term has probability 0 but is multiplied in by the tensor cores, which makes NaN of a value that is NaN or
// infinite. Where masked terms meet such values, these functions go term by term instead.
#pragma once

#include "cuda/sm90/current/rows.cuh"

namespace moba::cuda::sm90::current {

// 0 for finite numbers, else NaN; added to a pair of earlier results.
template <class T>
__device__ __forceinline__ uint32_t accumulate_not_finite(uint32_t pair, uint32_t earlier) {
  uint32_t result;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0u), "r"(earlier));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0u), "r"(earlier));
  }
  return result;
}

// Whether the part of `bytes` of shared memory that is this thread's of kWarpgroup holds a NaN or an infinity.
template <class T>
__device__ __forceinline__ bool not_finite(const unsigned char* memory, int thread, int bytes) {
  const uint4* parts = reinterpret_cast<const uint4*>(memory) + thread;
  uint32_t a = 0, b = 0;
#pragma unroll 4
  for (int i = 0; i < bytes / (16 * kWarpgroup); ++i) {
    const uint4 part = parts[i * kWarpgroup];
    a = accumulate_not_finite<T>(part.x, a);
    b = accumulate_not_finite<T>(part.y, b);
    a = accumulate_not_finite<T>(part.z, a);
    b = accumulate_not_finite<T>(part.w, b);
  }
  return ((a | b) & 0x7fff7fff) != 0;
}

// out += weights times values, as the products do, but without the terms that `visible` excludes. `key`: position of
// the first of the values.
template <class T, int kOut>
__device__ __forceinline__ void multiply_exactly(float (&out)[kOut], const uint32_t (&weights)[kKeys / 4],
                                                 const unsigned char* values, const Visible& visible, int key) {
#pragma unroll 1
  for (int row = 0; row < kKeys; ++row) {
    // The lane of the four that holds the weight, and its pair.
    uint32_t pair0 = 0, pair1 = 0;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const uint32_t here = i == row / 8 ? 0xffffffffu : 0u;
      pair0 |= weights[2 * i] & here;
      pair1 |= weights[2 * i + 1] & here;
    }
    const int from = row % 8 / 2;
    const float2 both0 = unpack<T>(__shfl_sync(kAll, pair0, from, 4));
    const float2 both1 = unpack<T>(__shfl_sync(kAll, pair1, from, 4));
    const float weight0 = row % 2 ? both0.y : both0.x, weight1 = row % 2 ? both1.y : both1.x;
    const bool seen0 = static_cast<unsigned>(key + row - visible.begin[0]) < static_cast<unsigned>(visible.count[0]);
    const bool seen1 = static_cast<unsigned>(key + row - visible.begin[1]) < static_cast<unsigned>(visible.count[1]);
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      const unsigned char* part = values + i / 8 * (kKeys * kPanelRowBytes) + swizzled(row, i % 8);
      const float2 value = unpack<T>(*reinterpret_cast<const uint32_t*>(part + lane() % 4 * 4));
      if (seen0) {
        out[4 * i] += weight0 * value.x;
        out[4 * i + 1] += weight0 * value.y;
      }
      if (seen1) {
        out[4 * i + 2] += weight1 * value.x;
        out[4 * i + 3] += weight1 * value.y;
      }
    }
  }
  __syncwarp();
}

}  // namespace moba::cuda::sm90::current
