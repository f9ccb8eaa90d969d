// What the products need of each query row: lse to base 2 and delta = sum(dout * out) - dlse. head_dim / 8 lanes hold a
// row, 16 bytes each.
#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward_work.h"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a lane

template <class T>
struct alignas(16) Part {
  T data[kColumns];
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ BackwardParams p, Workspace work, bool reduce) {
  constexpr int kLanes = kHeadDim / kColumns;
  const Shape& shape = p.shape;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int64_t local = index / shape.rows, row = index - local * shape.rows;
  if (local >= p.lists.units_k.count * shape.heads_per_key_head()) return;
  const int lane = threadIdx.x % kLanes;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  const int64_t unit = p.lists.units_k.begin * shape.heads_per_key_head() + local;
  const auto load = [&](const Source& source) {
    return *reinterpret_cast<const Part<T>*>(unit_base<T>(source, unit, shape.heads) + row * source.row +
                                             lane * kColumns);
  };
  const Part<T> dout = load(p.dout), out = load(p.out);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += to_acc(dout.data[i]) * to_acc(out.data[i]);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(lanes, sum, offset);
  bool current = false;
  for (int64_t slot = lane; slot < shape.slots; slot += kLanes) {
    current |= p.lists.positions[index * shape.slots + slot] == kCurrent;
  }
  current = __any_sync(lanes, current);
  if (index == 0) work.counters->broken = 0;
  if (lane == 0) {
    const float lse = unit_base<float>(p.lse, unit, shape.heads)[row * p.lse.row];
    // exp2(score - inf) is 0.
    const float base = lse == -INFINITY ? INFINITY : lse * kLog2e;
    work.lse[index] = base;
    work.own_lse[index] = current ? base : INFINITY;
    work.delta[index] = sum - unit_base<float>(p.dlse, unit, shape.heads)[row * p.dlse.row];
  }
  if (reduce) {
    float4* sums = reinterpret_cast<float4*>(work.sums + index * kHeadDim) + lane;
    sums[0] = sums[kLanes] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

}  // namespace

cudaError_t launch_prepare(const BackwardParams& p, const Workspace& work, bool reduce, Dtype dtype,
                           cudaStream_t stream) {
  const int64_t threads = p.lists.units_k.count * heads_rows(p.shape) * (p.shape.head_dim / kColumns);
  const int64_t grid = (threads + kThreads - 1) / kThreads;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p, work, reduce);
    return cudaGetLastError();
  };
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) return wide ? launch(prepare_kernel<__half, 128>) : launch(prepare_kernel<__half, 64>);
  return wide ? launch(prepare_kernel<__nv_bfloat16, 128>) : launch(prepare_kernel<__nv_bfloat16, 64>);
}

}  // namespace moba::cuda::sm90::backward
