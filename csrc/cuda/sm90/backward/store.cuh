// dk and dv of a key tile, from the registers of the consumer warpgroups to memory.
#pragma once

#include "cuda/sm90/backward/plan.cuh"

namespace moba::cuda::sm90::backward {

// Word j of lane i of each four lanes becomes word i of lane j.
__device__ __forceinline__ void transpose(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
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

// One of 256 consumer threads: its part of the rows of a key tile. Four lanes write 64 bytes of a row at a time.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_rows(const float (&sums)[kHeadDim / 2], float factor, const Target& target,
                                           const Shape& shape, int64_t unit_k, int key_begin, int keys, int thread) {
  const int key = thread / 32 * 16 + thread % 32 / 4;
  T* to = static_cast<T*>(target.data) + unit_k / shape.heads_k * target.group + unit_k % shape.heads_k * target.head +
          (key_begin + key) * target.row + thread % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * i + j) + 2 * half;
        words[j] = pack<T>(sums[at] * factor, sums[at + 1] * factor);
      }
      transpose(words);
      if (key + 8 * half < keys) {
        *reinterpret_cast<uint4*>(to + 32 * i + half * 8 * target.row) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// Whether all sums of a thread are finite.
template <int kCount>
__device__ __forceinline__ bool all_finite(const float (&sums)[kCount]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) zero = fmaf(sums[i], 0.f, zero);
  return zero == 0.f;
}

// A slab holds dk, then dv; consecutive threads have consecutive 16 bytes.
template <int kHeadDim>
__device__ __forceinline__ float4* slab_at(float* slabs, int64_t slab, int which, int thread) {
  return reinterpret_cast<float4*>(slabs + (2 * slab + which) * (kKeyTile * kHeadDim)) + thread;
}

}  // namespace moba::cuda::sm90::backward
