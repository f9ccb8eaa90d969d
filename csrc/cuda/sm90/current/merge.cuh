// Adds the partial results of past blocks to the rows of a consumer. Past blocks have no masked terms, so what is not
// finite in a partial result belongs there.
#pragma once

#include "cuda/sm90/current/rows.cuh"

namespace moba::cuda::sm90::current {

// Where 16 bytes of a partial result lie in its row of a stage: two neighbouring rows are read at a time.
__device__ __forceinline__ int staged_part(int row, int part) { return part ^ ((row & 1) << 2); }

// One of the two rows of this thread. `row`: of the first of them, in the stage.
template <class T, int kHalf, int kHeadDim>
__device__ __forceinline__ void merge_row(Rows<kHeadDim>& rows, const Stage<kHeadDim>& stage, int row) {
  const float lse = stage.lse[row + 8 * kHalf];
  const float largest = fmaxf(rows.largest[kHalf], lse);
  const float base = finite_base(largest);
  const float shrink = exp2_approximate(rows.largest[kHalf] - base), weight = exp2_approximate(lse - base);
  rows.largest[kHalf] = largest;
  rows.sum[kHalf] = rows.sum[kHalf] * shrink + weight;
  const unsigned char* from = stage.rows + (row + 8 * kHalf) * kHeadDim * 2;
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    const uint4 part = *reinterpret_cast<const uint4*>(from + staged_part(row, 4 * i + lane() % 4) * 16);
    const uint32_t words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 value = unpack<T>(words[j]);
      float* out = rows.out + 4 * (4 * i + j) + 2 * kHalf;
      out[0] = fmaf(weight, value.x, out[0] * shrink);
      out[1] = fmaf(weight, value.y, out[1] * shrink);
    }
  }
}

template <class T, int kHeadDim>
__device__ __forceinline__ void merge_stage(Rows<kHeadDim>& rows, const Stage<kHeadDim>& stage, int row) {
  merge_row<T, 0>(rows, stage, row);
  merge_row<T, 1>(rows, stage, row);
}

}  // namespace moba::cuda::sm90::current
