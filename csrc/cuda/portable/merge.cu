// Merges the partial outputs of each row by their lse, in slot order. One warp per row.
#include "cuda/launch.h"
#include "cuda/portable/unit.cuh"

namespace moba::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kColumnsPerLane = kMaxHeadDim / 32;

template <class T>
__global__ void __launch_bounds__(32 * kWarps) merge_kernel(MergeParams p) {
  using A = acc_t<T>;
  const Shape& shape = p.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t local = index / shape.rows, row = index % shape.rows;
  if (local >= p.units.count) return;
  const int lane = threadIdx.x % 32;
  const int64_t unit = p.units.begin + local;
  const int32_t* choices = p.lists.choices + ((unit - p.lists.units.begin) * shape.rows + row) * shape.slots;
  const int64_t first = index * shape.slots;
  const A* partial_out = static_cast<const A*>(p.partial_out) + first * shape.head_dim;
  const A* partial_lse = static_cast<const A*>(p.partial_lse) + first;

  A largest = minus_infinity<A>();
  for (int64_t slot = 0; slot < shape.slots; ++slot) {
    if (choices[slot] >= 0) largest = maximum(largest, partial_lse[slot]);
  }
  const A base = finite_base(largest);
  A sum = 0;
  A out[kColumnsPerLane] = {};
  for (int64_t slot = 0; slot < shape.slots; ++slot) {
    if (choices[slot] < 0) continue;  // nothing was written there
    const A weight = exponential(partial_lse[slot] - base);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      const int column = lane + 32 * i;
      if (column < shape.head_dim) out[i] += weight * partial_out[slot * shape.head_dim + column];
    }
  }

  const bool empty = sum == A(0);
  T* to = unit_base<T>(p.out, unit, shape.heads) + row * p.out.row;
#pragma unroll
  for (int i = 0; i < kColumnsPerLane; ++i) {
    const int column = lane + 32 * i;
    if (column < shape.head_dim) to[column] = from_acc<T>(empty ? A(0) : out[i] / sum);
  }
  if (lane == 0) {
    unit_base<A>(p.lse, unit, shape.heads)[row * p.lse.row] = empty ? minus_infinity<A>() : base + logarithm(sum);
  }
}

}  // namespace

cudaError_t launch_merge(const MergeParams& p, Dtype dtype, cudaStream_t stream) {
  const int64_t grid = (p.units.count * p.shape.rows + kWarps - 1) / kWarps;
  if (!fits_grid(grid) || p.shape.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    merge_kernel<T><<<static_cast<unsigned>(grid), 32 * kWarps, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace moba::cuda
