// Which routing calls the Hopper stages take, and the gate kernel that a call needs.
#include "cuda/portable/unit.cuh"
#include "cuda/sm90/route/gate.h"
#include "cuda/sm90/route/route.h"
#include "cuda/sm90/tensor_map.h"

namespace moba::cuda::sm90 {
namespace {

constexpr int kFillThreads = 256;

Extent queries(const Shape& shape) { return {shape.groups, shape.heads, shape.rows, shape.head_dim}; }
Extent means(const Shape& shape) { return {1, 1, shape.units_k() * shape.blocks(), shape.head_dim}; }

// One slot: the current block.
__global__ void __launch_bounds__(kFillThreads) fill_kernel(const __grid_constant__ GateParams p) {
  const Shape& shape = p.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (index >= shape.units() * shape.rows) return;
  const int64_t unit = index / shape.rows, row = index % shape.rows;
  const int64_t position = sequence_of_row(shape, row).position(row);
  unit_base<int32_t>(p.route, unit, shape.heads)[row * p.route.row] =
      position < 0 ? -1 : static_cast<int32_t>(position / shape.block_size);
}

template <class F>
auto with_gate(const Shape& shape, Dtype dtype, F f) {
  const auto by_slots = [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    const int64_t wanted = shape.slots - 1;
    if (wanted <= 2) return f(Gate<T, kHeadDim, 2>{});
    if (wanted <= 8) return f(Gate<T, kHeadDim, 8>{});
    if (wanted <= 16) return f(Gate<T, kHeadDim, 16>{});
    return f(Gate<T, kHeadDim, 64>{});
  };
  const auto by_head_dim = [&](auto type) {
    return shape.head_dim == 64 ? by_slots(type, std::integral_constant<int, 64>{})
                                : by_slots(type, std::integral_constant<int, 128>{});
  };
  return dtype == Dtype::kHalf ? by_head_dim(Type<__half>{}) : by_head_dim(Type<__nv_bfloat16>{});
}

}  // namespace

cudaError_t launch_gate_topk(const GateParams& p, Dtype dtype, cudaStream_t stream) {
  const Shape& shape = p.shape;
  if (p.units.begin != 0 || p.units.count != shape.units()) return cudaErrorInvalidValue;
  if (shape.slots == 1) {
    const int64_t grid = (shape.units() * shape.rows + kFillThreads - 1) / kFillThreads;
    if (!fits_grid(grid)) return cudaErrorInvalidValue;
    fill_kernel<<<static_cast<unsigned>(grid), kFillThreads, 0, stream>>>(p);
    return cudaGetLastError();
  }
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const Source mean_rows{p.means, 0, 0, shape.head_dim};
  CUtensorMap map_q, map_means;
  status = make_tensor_map(map_q, p.q, queries(shape), 64, dtype);
  if (status == cudaSuccess) status = make_tensor_map(map_means, mean_rows, means(shape), 128, dtype);
  if (status != cudaSuccess) return status;
  return with_gate(shape, dtype, [&](auto gate) {
    return decltype(gate)::launch(p, map_q, map_means, static_cast<unsigned>(processors), stream);
  });
}

}  // namespace moba::cuda::sm90
