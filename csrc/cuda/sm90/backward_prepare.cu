// What the products need first. Of each query row: lse to base 2 and delta = sum(dout * out) - dlse; head_dim / 8 lanes
// hold a row, 16 bytes each. And the items of work, by the first thread block.
#include "cuda/sm90/backward_items.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreads = 512;
constexpr int kColumns = 8;  // of a lane

template <class T>
struct alignas(16) Part {
  T data[kColumns];
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work,
                   const __grid_constant__ Pass pass, int processors, int unit_blocks, bool reduce) {
  if (blockIdx.x == 0) {
    cut_into_items<kThreads>(p, work, pass, processors);
    if (threadIdx.x == 0) work.counters->broken = 0;
    return;
  }
  constexpr int kLanes = kHeadDim / kColumns;
  const Shape& shape = p.shape;
  const int block = static_cast<int>(blockIdx.x) - 1, local = block / unit_blocks;
  const int64_t row = static_cast<int64_t>(block - local * unit_blocks) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= shape.rows) return;
  const int64_t index = local * shape.rows + row;
  const int lane = threadIdx.x % kLanes;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  const int64_t unit = p.lists.units_k.begin * shape.heads_per_key_head() + local;
  const auto load = [&](const Source& source) {
    return *reinterpret_cast<const Part<T>*>(unit_base<T>(source, unit, shape.heads) + row * source.row +
                                             lane * kColumns);
  };
  const Part<T> dout = load(p.dout), out = load(p.out);
  bool current = false;
  for (int64_t slot = lane; slot < shape.slots; slot += kLanes) {
    current |= p.lists.positions[index * shape.slots + slot] == kCurrent;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += to_acc(dout.data[i]) * to_acc(out.data[i]);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(lanes, sum, offset);
  current = __any_sync(lanes, current);
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

__global__ void __launch_bounds__(kThreads)
    items_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work,
                 const __grid_constant__ Pass pass, int processors) {
  cut_into_items<kThreads>(p, work, pass, processors);
}

}  // namespace

cudaError_t launch_prepare(const BackwardParams& p, const Workspace& work, const Pass& pass, bool reduce,
                           int processors, Dtype dtype, cudaStream_t stream) {
  const int64_t block_rows = kThreads * kColumns / p.shape.head_dim;
  const int64_t unit_blocks = (p.shape.rows + block_rows - 1) / block_rows;
  const int64_t grid = 1 + p.lists.units_k.count * p.shape.heads_per_key_head() * unit_blocks;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p, work, pass, processors,
                                                                 static_cast<int>(unit_blocks), reduce);
    return cudaGetLastError();
  };
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) return wide ? launch(prepare_kernel<__half, 128>) : launch(prepare_kernel<__half, 64>);
  return wide ? launch(prepare_kernel<__nv_bfloat16, 128>) : launch(prepare_kernel<__nv_bfloat16, 64>);
}

cudaError_t launch_items(const BackwardParams& p, const Workspace& work, const Pass& pass, int processors,
                         cudaStream_t stream) {
  items_kernel<<<1, kThreads, 0, stream>>>(p, work, pass, processors);
  return cudaGetLastError();
}

}  // namespace moba::cuda::sm90::backward
