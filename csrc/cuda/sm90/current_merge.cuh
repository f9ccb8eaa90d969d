// Adds the partial results of past blocks to the rows of a consumer.
//
// The products of the past stage multiply masked terms only where a key tile reaches beyond its block. Blocks of such a
// size are therefore computed again, term by term, where their partial result is not finite.
#pragma once

#include "cuda/sm90/current.h"
#include "cuda/sm90/current_exact.cuh"
#include "cuda/sm90/current_producer.cuh"

namespace moba::cuda::sm90::current {

// The block whose list holds an entry.
__device__ __forceinline__ int block_of_entry(const int32_t* list_begin, int blocks, int entry) {
  int low = 0, high = blocks - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(list_begin + middle) <= entry) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// out += the values of a past block, weighted by 2^(scaled score - base), for one of the two rows of the four lanes that
// hold it. `number`: of the partial result in the row.
template <class T, int kHalf, int kHeadDim>
__device__ __forceinline__ void attend_block(Rows<kHeadDim>& rows, const CurrentParams& p, const Schedule& schedule,
                                             int unit, int row, int number, float scale, float base) {
  const unsigned quad = 0xfu << (lane() & ~3);
  const int64_t unit_k = unit / schedule.heads_per_key_head;
  const int64_t local = (unit - schedule.unit_begin) / schedule.heads_per_key_head;
  const int blocks = static_cast<int>(p.shape.blocks());
  const int32_t* position = p.lists.positions + ((unit - schedule.unit_begin) * p.shape.rows + row) * schedule.slots;
  int entry = __ldg(position);
  while (entry < 0 || number-- > 0) entry = __ldg(++position);
  const Block block =
      block_at(p.shape, block_of_entry(p.lists.list_begin + local * (blocks + 1), blocks, entry));
  const T* q = unit_base<T>(p.q, unit, p.shape.heads) + row * p.q.row;
  const T* k = unit_base<T>(p.k, unit_k, p.shape.heads_k) + block.key_begin * p.k.row;
  const T* v = unit_base<T>(p.v, unit_k, p.shape.heads_k) + block.key_begin * p.v.row;
  const int column = lane() % 4 * 2;
#pragma unroll 1
  for (int key = 0; key < block.keys; ++key, k += p.k.row, v += p.v.row) {
    float score = 0;
#pragma unroll 4
    for (int i = column; i < kHeadDim; i += 8) {
      score += to_acc(q[i]) * to_acc(k[i]) + to_acc(q[i + 1]) * to_acc(k[i + 1]);
    }
    score += __shfl_xor_sync(quad, score, 1);
    score += __shfl_xor_sync(quad, score, 2);
    const float weight = exp2_approximate(fmaf(score, scale, -base));
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      rows.out[4 * i + 2 * kHalf] += weight * to_acc(v[8 * i + column]);
      rows.out[4 * i + 2 * kHalf + 1] += weight * to_acc(v[8 * i + column + 1]);
    }
  }
}

// One of the two rows; `row0`: in the stage, as the other is 8 rows below. `row`: of the unit.
template <class T, int kHalf, int kHeadDim>
__device__ __forceinline__ void merge_row(Rows<kHeadDim>& rows, const Stage<kHeadDim>& stage, int number,
                                          int row0, const CurrentParams& p, const Schedule& schedule, int unit, int row,
                                          float scale) {
  const float lse = stage.lse[row0 + 8 * kHalf];
  const float largest = fmaxf(rows.largest[kHalf], lse);
  const float base = finite_base(largest);
  const float shrink = exp2_approximate(rows.largest[kHalf] - base), weight = exp2_approximate(lse - base);
  rows.largest[kHalf] = largest;
  rows.sum[kHalf] = rows.sum[kHalf] * shrink + weight;
  const unsigned char* from = stage.rows + (row0 + 8 * kHalf) * kHeadDim * 2;
  uint4 parts[kHeadDim / 32];
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    parts[i] = *reinterpret_cast<const uint4*>(from + staged_part(row0, 4 * i + lane() % 4) * 16);
  }
  if (schedule.block_size % kKeys != 0) {
    uint32_t bad = 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      bad = accumulate_not_finite<T>(parts[i].x, bad);
      bad = accumulate_not_finite<T>(parts[i].y, bad);
      bad = accumulate_not_finite<T>(parts[i].z, bad);
      bad = accumulate_not_finite<T>(parts[i].w, bad);
    }
    const unsigned quad = 0xfu << (lane() & ~3);
    if (__any_sync(kAll, (bad & 0x7fff7fff) != 0) && __any_sync(quad, (bad & 0x7fff7fff) != 0)) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) parts[i] = make_uint4(0, 0, 0, 0);
      rows.rescale(kHalf == 0 ? make_float2(shrink, 1.f) : make_float2(1.f, shrink));
      attend_block<T, kHalf>(rows, p, schedule, unit, row + 8 * kHalf, number, scale, base);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    const uint32_t words[4] = {parts[i].x, parts[i].y, parts[i].z, parts[i].w};
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
__device__ __forceinline__ void merge_stage(Rows<kHeadDim>& rows, const Stage<kHeadDim>& stage, int number,
                                            int row0, const CurrentParams& p, const Schedule& schedule, const Tile& tile,
                                            int row_in_tile, float scale) {
  const int row = tile.row + row_in_tile;
  merge_row<T, 0>(rows, stage, number, row0, p, schedule, tile.unit, row, scale);
  merge_row<T, 1>(rows, stage, number, row0, p, schedule, tile.unit, row, scale);
}

}  // namespace moba::cuda::sm90::current
