// dq of a tile, from the registers of a consumer warpgroup to the sums or partials.
#pragma once

#include "cuda/sm90/backward/plan.cuh"

namespace moba::cuda::sm90::backward {

// What a thread has of dq in the first or second (kHalf) of its rows of a product, arranged for memory, 16 bytes after
// 16 bytes. Out of the registers of the product, which the next one needs soon.
template <bool kReduce, int kQuery>
struct ArrangedRow {
  uint32_t words[kReduce ? kQuery / 2 : kQuery / 4];
};

// In sums, lanes 16 apart exchange halves of what they hold of their rows, so that eight lanes add to 128 bytes in one
// place: elements at and at + 8 of each 16 become those of the lower and of the upper row.
template <class T, bool kReduce, int kHalf, int kQuery>
__device__ __forceinline__ ArrangedRow<kReduce, kQuery> arrange_row(const float (&values)[kQuery], float factor,
                                                                    int thread) {
  ArrangedRow<kReduce, kQuery> row;
  if constexpr (kReduce) {
    const bool upper = thread & 16;
#pragma unroll
    for (int i = 0; i < kQuery / 4; ++i) {
      const int part = i / 4, at = 16 * part + 2 * kHalf + i % 2 + i / 2 % 2 * 4;
      const float received = __shfl_xor_sync(0xffffffffu, upper ? values[at] : values[at + 8], 16);
      row.words[i] = __float_as_uint(upper ? received : values[at]);
      row.words[kQuery / 4 + i] = __float_as_uint(upper ? values[at + 8] : received);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kQuery / 4; ++i) {
      const int at = 4 * i + 2 * kHalf;
      row.words[i] = pack<T>(values[at] * factor, values[at + 1] * factor);
    }
  }
  return row;
}

// half: which columns the warpgroup has.
template <class T, int kHeadDim, bool kReduce, int kHalf>
__device__ __forceinline__ void store_row(const ArrangedRow<kReduce, kHeadDim / 4>& row, const Tile& tile, int half,
                                          int thread) {
  constexpr int kParts = kHeadDim / 64;  // of 16 bytes, of each row
  const int lane = thread % 32, first = thread % kWarpgroup / 32 * 16 + 8 * kHalf;
  const uint32_t* words = row.words;
  if constexpr (kReduce) {
    float* sums = static_cast<float*>(tile.rows) + half * (kHeadDim / 2) + lane / 16 * 16 + lane % 4 * 4;
#pragma unroll
    for (int up = 0; up < 2; ++up) {
      const uint32_t target = tile.target[first + lane % 16 / 4 + 4 * up];
      float* to = sums + static_cast<int64_t>(target) * kHeadDim;
#pragma unroll
      for (int i = 0; i < kParts; ++i, words += 4) {
        add_in_memory(to + 32 * i, __uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]),
                      __uint_as_float(words[3]), target != kNobody);
      }
    }
  } else {
    const uint32_t target = tile.target[first + lane / 4];
    T* to = static_cast<T*>(tile.rows) + static_cast<int64_t>(target) * kHeadDim + half * (kHeadDim / 2) + lane % 4 * 8;
    if (target == kNobody) return;
#pragma unroll
    for (int i = 0; i < kParts; ++i, words += 4) {
      store_streaming(to + 32 * i, words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace moba::cuda::sm90::backward
