// Where a sum of dk or dv was not finite: what exact arithmetic gives. Does nothing otherwise.
#include "cuda/sm90/backward_exact.cuh"
#include "cuda/sm90/backward_tiles.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreads = 256;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    repair_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work) {
  if (work.counters->broken == 0) return;
  using E = Exact<T, kHeadDim>;
  const E exact(p, work);
  const Pass pass{0, static_cast<int32_t>(block_tiles(p.shape)), true, true};
  const int64_t tiles = p.lists.units_k.count * p.shape.blocks() * pass.tiles;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Item tile = key_tile(p, pass, index);
    const int64_t unit_k = p.lists.units_k.begin + tile.unit_k;
    for (int key = threadIdx.x / E::kLanes; key < tile.keys; key += kThreads / E::kLanes) {
      T* dk =
          unit_base<T>(p.dk, unit_k, p.shape.heads_k) + (tile.key_begin + key) * p.dk.row + exact.lane * E::kColumns;
      T* dv =
          unit_base<T>(p.dv, unit_k, p.shape.heads_k) + (tile.key_begin + key) * p.dv.row + exact.lane * E::kColumns;
      float sums_k[E::kColumns], sums_v[E::kColumns];
#pragma unroll
      for (int i = 0; i < E::kColumns; ++i) {
        sums_k[i] = to_acc(dk[i]);
        sums_v[i] = to_acc(dv[i]);
      }
      if (!exact.any_broken(sums_k) && !exact.any_broken(sums_v)) continue;
      exact.key(sums_k, sums_v, tile, key);
#pragma unroll
      for (int i = 0; i < E::kColumns; ++i) {
        dk[i] = from_acc<T>(sums_k[i]);
        dv[i] = from_acc<T>(sums_v[i]);
      }
    }
  }
}

}  // namespace

cudaError_t launch_repair(const BackwardParams& p, const Workspace& work, int processors, Dtype dtype,
                          cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<processors, kThreads, 0, stream>>>(p, work);
    return cudaGetLastError();
  };
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) return wide ? launch(repair_kernel<__half, 128>) : launch(repair_kernel<__half, 64>);
  return wide ? launch(repair_kernel<__nv_bfloat16, 128>) : launch(repair_kernel<__nv_bfloat16, 64>);
}

}  // namespace moba::cuda::sm90::backward
