// Rows of Mode::kMasked that came out not finite, computed again term by term.
//
// Tensor cores multiply masked terms in with weight 0, and the softmax with a bias of minus infinity, which makes NaN
// of a value or a score that is NaN or infinite. Nothing turns that back into a number, so a row that comes out finite
// has met none, and finite data pays nothing. What the others cost is bounded by their visible keys.
#pragma once

#include "cuda/sm90/current/choice.cuh"

namespace moba::cuda::sm90::current {

// One warp: the 16 rows of each tile that it has written itself.
template <class T, int kHeadDim>
struct Repair {
  static constexpr int kColumns = kHeadDim / 32;  // of a lane
  struct alignas(2 * kColumns) Part {
    T data[kColumns];
  };

  const CurrentParams& p;
  const Schedule& schedule;
  int first_row;  // of the warp, in the tile
  float scale;

  __device__ __forceinline__ static float dot(const T* query, const T* key) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const uint4 a = __ldg(reinterpret_cast<const uint4*>(query) + i);
      const uint4 b = __ldg(reinterpret_cast<const uint4*>(key) + i);
      const uint32_t words_a[4] = {a.x, a.y, a.z, a.w}, words_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = unpack<T>(words_a[j]), y = unpack<T>(words_b[j]);
        sum = fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
      }
    }
    return sum;
  }

  __device__ __forceinline__ void attend(const Tile& tile, int row, T* to, float* lse) const {
    const int unit_k = tile.unit / schedule.heads_per_key_head, position = tile.position + row;
    const T* query = unit_base<T>(p.q, tile.unit, p.shape.heads) + (tile.row + row) * p.q.row;
    const T* keys = unit_base<T>(p.k, unit_k, p.shape.heads_k) + tile.key_begin * p.k.row;
    const T* values = unit_base<T>(p.v, unit_k, p.shape.heads_k) + tile.key_begin * p.v.row + lane() * kColumns;
    const RowChoice choice(p, schedule, tile, row);
    uint64_t chosen = 0;
    for (int slot = lane(); slot < schedule.slots; slot += 32) chosen |= choice.bits(schedule, slot);
    chosen = reduce_or(chosen);

    float largest = -INFINITY, sum = 0, out[kColumns] = {};
    for (; chosen != 0; chosen &= chosen - 1) {
      const int begin = (__ffsll(static_cast<long long>(chosen)) - 1) * kKeys, end = min(begin + kKeys, position + 1);
      for (int first = begin; first < end; first += 32) {
        const int key = first + lane();
        const float score = key < end ? dot(query, keys + key * p.k.row) * scale : -INFINITY;
        float now = score;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) now = fmaxf(now, __shfl_xor_sync(kAll, now, offset));
        now = fmaxf(now, largest);
        const float base = finite_base(now), shrink = exp2_approximate(largest - base);
        const float weight = key < end ? exp2_approximate(score - base) : 0.f;
        largest = now;
        sum = sum * shrink + weight;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) out[i] *= shrink;
        for (int i = 0; i < min(32, end - first); ++i) {
          const Part value = *reinterpret_cast<const Part*>(values + (first + i) * p.v.row);
          const float of_key = __shfl_sync(kAll, weight, i);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) out[j] = fmaf(of_key, to_acc(value.data[j]), out[j]);
        }
      }
    }
    sum = warp_sum(sum);
    Part result;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) result.data[i] = from_acc<T>(sum == 0.f ? 0.f : out[i] / sum);
    *reinterpret_cast<Part*>(to + lane() * kColumns) = result;
    if (lane() == 0) *lse = sum == 0.f ? -INFINITY : (largest + __log2f(sum)) * kLn2;
  }

  __device__ __forceinline__ void run() const {
    __syncwarp();  // the results are there
    for_each_tile<Plan<kHeadDim, Mode::kMasked>>(p.shape, schedule, [&](const Tile& tile) {
      const int end = min(first_row + 16, tile.rows);
      for (int row = first_row; row < end; ++row) {
        T* out = unit_base<T>(p.out, tile.unit, p.shape.heads) + (tile.row + row) * p.out.row;
        float* lse = unit_base<float>(p.lse, tile.unit, p.shape.heads) + tile.row + row;
        const Part part = *reinterpret_cast<const Part*>(out + lane() * kColumns);
        bool finite = *lse < INFINITY;  // minus infinity: a row that sees nothing
#pragma unroll
        for (int i = 0; i < kColumns; ++i) finite = finite && fabsf(to_acc(part.data[i])) < INFINITY;
        __syncwarp();
        if (!__all_sync(kAll, finite)) attend(tile, row, out, lse);
      }
    });
  }
};

}  // namespace moba::cuda::sm90::current
