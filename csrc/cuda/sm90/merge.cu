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
constexpr int kColumns = 8;

template <class T>
struct alignas(16) Part {
  T data[kColumns];
};

template <class T>
__device__ __forceinline__ void load(float (&to)[kColumns], const T* from) {
  const Part<T> part = *reinterpret_cast<const Part<T>*>(from);
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

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) merge_kernel(AttendParams p, Target out, Target lse) {
  constexpr int kLanes = kHeadDim / kColumns;
  const Shape& shape = p.shape;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int64_t local = index / shape.rows, row = index % shape.rows;
  if (local >= p.units.count) return;
  const int lane = threadIdx.x % kLanes, column = lane * kColumns;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  const int64_t unit = p.units.begin + local;
  const int slots = static_cast<int>(shape.slots);
  const int32_t* choices = p.lists.choices + ((unit - p.lists.units.begin) * shape.rows + row) * slots;
  const T* partial_out = static_cast<const T*>(p.partial_out) + index * slots * kHeadDim + column;
  const float* partial_lse = static_cast<const float*>(p.partial_lse) + index * slots;

  // Where nothing was written, or no key counts, lse is minus infinity.
  const auto lse_of = [&](int slot) { return choices[slot] >= 0 ? partial_lse[slot] : minus_infinity<float>(); };
  float largest = minus_infinity<float>();
#pragma unroll 4
  for (int slot = 0; slot < slots; ++slot) largest = maximum(largest, lse_of(slot));
  const float base = finite_base(largest);
  float sum = 0, total[kColumns] = {}, part[kColumns];
#pragma unroll 4
  for (int slot = 0; slot < slots; ++slot) {
    const float own = lse_of(slot);
    if (own == minus_infinity<float>()) continue;
    const float weight = exponential(own - base);
    load(part, partial_out + slot * kHeadDim);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += weight * part[i];
  }
  if (__any_sync(lanes, !finite(total))) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] = 0;
    for (int slot = 0; slot < slots; ++slot) {
      const float own = lse_of(slot);
      if (own == minus_infinity<float>()) continue;
      load(part, partial_out + slot * kHeadDim);
      if (__any_sync(lanes, !finite(part))) {
        recompute<T, kLanes>(part, p, unit, row, choices[slot], own, column, lanes);
      }
      const float weight = exponential(own - base);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += weight * part[i];
    }
  }

  const bool empty = sum == 0.f;
  Part<T> result;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) result.data[i] = from_acc<T>(empty ? 0.f : total[i] / sum);
  *reinterpret_cast<Part<T>*>(unit_base<T>(out, unit, shape.heads) + row * out.row + column) = result;
  if (lane == 0) {
    unit_base<float>(lse, unit, shape.heads)[row * lse.row] = empty ? minus_infinity<float>() : base + logarithm(sum);
  }
}

template <class T, int kHeadDim>
cudaError_t launch(const AttendParams& p, const Target& out, const Target& lse, cudaStream_t stream) {
  constexpr int kRowsPerBlock = kThreads * kColumns / kHeadDim;
  const int64_t grid = (p.units.count * p.shape.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  merge_kernel<T, kHeadDim><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p, out, lse);
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
