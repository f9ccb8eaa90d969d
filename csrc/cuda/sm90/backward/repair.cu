// Gradients that are not finite, computed again. Does nothing if all are.
#include "cuda/sm90/backward/exact.cuh"
#include "cuda/sm90/backward/tiles.cuh"
#include "cuda/sm90/dependent.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreads = 256;

template <class T, int kHeadDim>
__device__ void repair_keys(const Exact<T, kHeadDim>& exact, const Item& tile) {
  using E = Exact<T, kHeadDim>;
  const BackwardParams& p = exact.p;
  const int64_t unit_k = p.lists.units_k.begin + tile.unit_k;
  for (int key = threadIdx.x / E::kLanes; key < tile.keys; key += kThreads / E::kLanes) {
    T* dk = unit_base<T>(p.dk, unit_k, p.shape.heads_k) + (tile.key_begin + key) * p.dk.row;
    T* dv = unit_base<T>(p.dv, unit_k, p.shape.heads_k) + (tile.key_begin + key) * p.dv.row;
    if (exact.all_finite(dk) && exact.all_finite(dv)) continue;
    typename E::Columns sums_k, sums_v;
    exact.key(sums_k, sums_v, tile, key);
    exact.store(dk, sums_k);
    exact.store(dv, sums_v);
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    repair_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work) {
  wait_for_earlier();
  if (work.counters->broken == 0) return;
  using E = Exact<T, kHeadDim>;
  const E exact(p, work);
  const Pass pass{0, work.block_tiles, true, true};
  const uint32_t tiles = static_cast<uint32_t>(p.lists.units_k.count) * work.unit_tiles;
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x)
    repair_keys(exact, key_tile(p, work, pass, index));
  constexpr int kRows = kThreads / E::kLanes;
  const int64_t rows = p.lists.units_k.count * heads_rows(p.shape);
  for (int64_t index = blockIdx.x * kRows + threadIdx.x / E::kLanes; index < rows; index += gridDim.x * kRows) {
    const int64_t local = index / p.shape.rows, row = index - local * p.shape.rows;
    const int64_t unit = p.lists.units_k.begin * p.shape.heads_per_key_head() + local;
    T* dq = unit_base<T>(p.dq, unit, p.shape.heads) + row * p.dq.row;
    if (exact.all_finite(dq)) continue;
    typename E::Columns sums;
    exact.query(sums, local, row);
    exact.store(dq, sums);
  }
}

}  // namespace

cudaError_t launch_repair(const BackwardParams& p, const Workspace& work, int processors, Dtype dtype,
                          cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    return launch_dependent(kernel, {static_cast<unsigned>(processors), kThreads, 0}, stream, p, work);
  };
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) return wide ? launch(repair_kernel<__half, 128>) : launch(repair_kernel<__half, 64>);
  return wide ? launch(repair_kernel<__nv_bfloat16, 128>) : launch(repair_kernel<__nv_bfloat16, 64>);
}

}  // namespace moba::cuda::sm90::backward
