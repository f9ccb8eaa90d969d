// Merges the partial outputs of each row by their lse, in slot order. head_dim / 8 lanes hold a row, 16 bytes each.
//
// The products of the attend stage multiply masked terms by 0, which is NaN for a value that is NaN or infinite. So
// where a merged row is not finite, its partials that are not are computed again here, without the masked terms. Their
// lse is right as it is: scores are masked before they are used.
#include "cuda/portable/unit.cuh"
#include "cuda/sm90/launch.h"

namespace moba::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;      // of a lane
constexpr int kSlotsAtOnce = 4;  // loads under way

template <class T>
struct alignas(16) Part {
  T data[kColumns];
};

template <class T>
__device__ __forceinline__ Part<T> load_part(const T* from) {
  return *reinterpret_cast<const Part<T>*>(from);
}

template <class T>
__device__ __forceinline__ void load(float (&to)[kColumns], const T* from) {
  const Part<T> part = load_part(from);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) to[i] = to_acc(part.data[i]);
}

__device__ __forceinline__ bool finite(const float (&values)[kColumns]) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) all = all && isfinite(values[i]);
  return all;
}

// Attention of one row to the keys of one block at positions not after its own, weighted by exp(score - lse).
template <class T, int kLanes>
__device__ void recompute(float (&out)[kColumns], const AttendParams& p, int64_t unit, int64_t row, int64_t number,
                          float lse, int column, unsigned lanes) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) out[i] = 0;
  const Block block = block_at(p.shape, number);
  const int64_t position = block.sequence.position(row), begin = block.key_begin - block.sequence.key_begin;
  const int64_t keys = min(block.keys, position + 1 - begin);
  const int64_t unit_k = unit / p.shape.heads_per_key_head();
  const T* k = unit_base<T>(p.k, unit_k, p.shape.heads_k) + block.key_begin * p.k.row + column;
  const T* v = unit_base<T>(p.v, unit_k, p.shape.heads_k) + block.key_begin * p.v.row + column;
  float query[kColumns], other[kColumns];
  load(query, unit_base<T>(p.q, unit, p.shape.heads) + row * p.q.row + column);
#pragma unroll 1
  for (int64_t key = 0; key < keys; ++key) {
    load(other, k + key * p.k.row);
    float score = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) score += query[i] * other[i];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(lanes, score, offset);
    const float weight = expf(score * static_cast<float>(p.softmax_scale) - lse);
    load(other, v + key * p.v.row);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] += weight * other[i];
  }
}

// The weighted sum of the partials of a row, those that are not finite computed again.
template <class T, int kLanes>
__device__ __forceinline__ void recompute_row(float (&total)[kColumns], const AttendParams& p, int64_t unit,
                                              int64_t row, const int32_t* choices, const T* partial_out,
                                              const float* partial_lse, float base, int column, unsigned lanes) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) total[i] = 0;
#pragma unroll 1
  for (int64_t slot = 0; slot < p.shape.slots; ++slot) {
    if (choices[slot] < 0) continue;
    const float lse = partial_lse[slot];
    if (lse == minus_infinity<float>()) continue;
    float part[kColumns];
    load(part, partial_out + slot * kLanes * kColumns);
    if (__any_sync(lanes, !finite(part))) {
      recompute<T, kLanes>(part, p, unit, row, choices[slot], lse, column, lanes);
    }
    const float weight = exponential(lse - base);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += weight * part[i];
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 3)
    merge_kernel(const __grid_constant__ AttendParams p, Target out, Target lse, int unit_blocks) {
  constexpr int kLanes = kHeadDim / kColumns;
  const int local = static_cast<int>(blockIdx.x) / unit_blocks, block = static_cast<int>(blockIdx.x) % unit_blocks;
  const int64_t row = static_cast<int64_t>(block) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= p.shape.rows) return;
  const int lane = threadIdx.x % kLanes, column = lane * kColumns;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  const int64_t unit = p.units.begin + local;
  const int slots = static_cast<int>(p.shape.slots);
  const int32_t* choices = p.lists.choices + ((unit - p.lists.units.begin) * p.shape.rows + row) * slots;
  const int64_t index = (local * p.shape.rows + row) * slots;
  const T* partial_out = static_cast<const T*>(p.partial_out) + index * kHeadDim + column;
  const float* partial_lse = static_cast<const float*>(p.partial_lse) + index;

  // Each lane looks up one slot of kLanes. Where nothing was written, or no key counts, lse is minus infinity.
  const auto lse_of = [&](int slot) {
    if (slot >= slots) return minus_infinity<float>();
    const int32_t choice = choices[slot];
    const float value = partial_lse[slot];
    return choice >= 0 ? value : minus_infinity<float>();
  };
  float base = minus_infinity<float>(), sum = 0, total[kColumns] = {};
  for (int slot0 = 0; slot0 < slots; slot0 += kLanes) {
    const float own = lse_of(slot0 + lane);
    float largest = own;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      largest = maximum(largest, __shfl_xor_sync(lanes, largest, offset));
    }
    largest = maximum(largest, base);
    const float shrink = exponential(base - finite_base(largest));
    base = largest;
    const float own_weight = exponential(own - finite_base(base));
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] *= shrink;
    for (int slot = slot0; slot < min(slots, slot0 + kLanes); slot += kSlotsAtOnce) {
      float weight[kSlotsAtOnce];
      Part<T> part[kSlotsAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kSlotsAtOnce; ++i) {
        const int from = slot - slot0 + i;
        weight[i] = __shfl_sync(lanes, own_weight, from, kLanes);
        const bool written = __shfl_sync(lanes, own, from, kLanes) != minus_infinity<float>();
        if (written) part[i] = load_part(partial_out + (slot + i) * kHeadDim);
      }
#pragma unroll
      for (int i = 0; i < kSlotsAtOnce; ++i) {
        sum += weight[i];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) total[c] += weight[i] * to_acc(part[i].data[c]);
      }
    }
  }
  if (__any_sync(lanes, !finite(total))) {
    recompute_row<T, kLanes>(total, p, unit, row, choices, partial_out, partial_lse, finite_base(base), column, lanes);
  }

  const bool empty = sum == 0.f;
  Part<T> result;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) result.data[i] = from_acc<T>(empty ? 0.f : total[i] / sum);
  *reinterpret_cast<Part<T>*>(unit_base<T>(out, unit, p.shape.heads) + row * out.row + column) = result;
  if (lane == 0) {
    unit_base<float>(lse, unit, p.shape.heads)[row * lse.row] =
        empty ? minus_infinity<float>() : finite_base(base) + logarithm(sum);
  }
}

template <class T, int kHeadDim>
cudaError_t launch(const AttendParams& p, const Target& out, const Target& lse, cudaStream_t stream) {
  constexpr int kRowsPerBlock = kThreads * kColumns / kHeadDim;
  const int64_t unit_blocks = (p.shape.rows + kRowsPerBlock - 1) / kRowsPerBlock, grid = p.units.count * unit_blocks;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  merge_kernel<T, kHeadDim>
      <<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p, out, lse, static_cast<int>(unit_blocks));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_merge(const AttendParams& p, const Target& out, const Target& lse, Dtype dtype,
                         cudaStream_t stream) {
  if (dtype == Dtype::kHalf) {
    return p.shape.head_dim == 64 ? launch<__half, 64>(p, out, lse, stream) : launch<__half, 128>(p, out, lse, stream);
  }
  return p.shape.head_dim == 64 ? launch<__nv_bfloat16, 64>(p, out, lse, stream)
                                : launch<__nv_bfloat16, 128>(p, out, lse, stream);
}

}  // namespace moba::cuda::sm90
