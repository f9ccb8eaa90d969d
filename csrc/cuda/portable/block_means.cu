// Stage 1 of routing: the mean of every complete key block, rounded to the dtype of k.
#include "cuda/launch.h"
#include "cuda/portable/unit.cuh"

namespace moba::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kRows = 8;

template <class T>
__global__ void __launch_bounds__(kColumns* kRows) block_means_kernel(MeansParams p) {
  const int64_t blocks = p.shape.blocks();
  const int64_t unit = blockIdx.x / blocks;
  const Block block = block_at(p.shape, blockIdx.x % blocks);
  if (block.keys < p.shape.block_size) return;  // only ever a current block, which has no gate score

  __shared__ acc_t<T> sums[kRows][kColumns];
  const T* k = unit_base<T>(p.k, unit, p.shape.heads_k);
  T* mean = static_cast<T*>(p.means) + blockIdx.x * p.shape.head_dim;
  for (int64_t d0 = 0; d0 < p.shape.head_dim; d0 += kColumns) {
    const int64_t d = d0 + threadIdx.x;
    acc_t<T> sum = 0;
    if (d < p.shape.head_dim) {
      for (int64_t key = threadIdx.y; key < block.keys; key += kRows) {
        sum += to_acc(k[(block.key_begin + key) * p.k.row + d]);
      }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && d < p.shape.head_dim) {
      for (int i = 1; i < kRows; ++i) sum += sums[i][threadIdx.x];
      mean[d] = from_acc<T>(sum / static_cast<acc_t<T>>(block.keys));
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_block_means(const MeansParams& p, Dtype dtype, cudaStream_t stream) {
  const int64_t grid = p.shape.units_k() * p.shape.blocks();
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    block_means_kernel<T><<<static_cast<unsigned>(grid), dim3(kColumns, kRows), 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace moba::cuda
