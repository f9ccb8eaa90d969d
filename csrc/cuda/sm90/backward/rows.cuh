// dq of a tile, from the registers of a consumer warpgroup to shared memory, and from there to the sums or partials.
#pragma once

#include "cuda/sm90/backward/plan.cuh"

namespace moba::cuda::sm90::backward {

// half: which columns the warpgroup has.
template <class T, int kHeadDim, bool kReduce>
__device__ __forceinline__ void stage_rows(const float (&values)[kHeadDim / 4], float factor, uint32_t staged, int half,
                                           int thread) {
  using S = Staged<kHeadDim, kReduce>;
  constexpr int kParts = S::kRowBytes / 2 / 64;  // of 16 bytes, of each row
  const int lane = thread % 32, row = thread % kWarpgroup / 32 * 16 + lane / 4;
  const uint32_t to = staged + S::offset(row) + half * (S::kRowBytes / 2) + lane % 4 * 16;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      uint32_t words[4];
      if constexpr (kReduce) {
        const float* from = values + 8 * i + 2 * lower;
        words[0] = __float_as_uint(from[0]);
        words[1] = __float_as_uint(from[1]);
        words[2] = __float_as_uint(from[4]);
        words[3] = __float_as_uint(from[5]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* from = values + 4 * (4 * i + j) + 2 * lower;
          words[j] = pack<T>(from[0] * factor, from[1] * factor);
        }
      }
      shared_store_16(to + lower * (4 * S::kRowBytes) + i * 64, words[0], words[1], words[2], words[3]);
    }
  }
}

// Row `row` of the tile, by one thread.
template <class T, int kHeadDim, bool kReduce>
__device__ __forceinline__ void move_row(const Tile& tile, uint32_t staged, int row) {
  using S = Staged<kHeadDim, kReduce>;
  const uint32_t target = tile.target[row];
  if (target == kNobody) return;
  const uint32_t from = staged + S::offset(row);
  const int64_t to = static_cast<int64_t>(target) * kHeadDim;
  if constexpr (kReduce) {
    bulk_add(static_cast<float*>(tile.rows) + to, from, S::kRowBytes);
  } else {
    bulk_store_streaming(static_cast<T*>(tile.rows) + to, from, S::kRowBytes);
  }
}

}  // namespace moba::cuda::sm90::backward
