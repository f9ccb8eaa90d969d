// Block means at the speed of memory: every key is read once, 16 bytes a lane, several loads under way. The sum of a
// block always runs in the same order.
#include <algorithm>

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/dependent.cuh"
#include "cuda/sm90/route/route.h"

namespace moba::cuda::sm90 {
namespace {

constexpr int kColumns = 8;  // of a lane
constexpr int kLoads = 8;    // under way in a lane
constexpr int kMaxWarps = 32;

template <class T>
struct alignas(16) Part {
  T data[kColumns];
};

// `warps` warps sum one block; a CTA takes as many blocks as it has warps for.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    block_means_kernel(const __grid_constant__ MeansParams p, int blocks, int warps, int64_t total) {
  wait_for_earlier();
  let_next_start();
  constexpr int kParts = kHeadDim / kColumns, kRows = 32 / kParts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32 / warps) + warp / warps;
  const int64_t unit = index / blocks;
  const Block block = block_at(p.shape, index - unit * blocks);
  // An incomplete block is only ever a current block, which has no gate score.
  const bool complete = index < total && block.keys == p.shape.block_size;
  const int keys = complete ? static_cast<int>(p.shape.block_size) : 0;

  const T* from = unit_base<T>(p.k, unit, p.shape.heads_k) + block.key_begin * p.k.row + lane % kParts * kColumns;
  const int step = warps * kRows;
  float sum[kColumns] = {};
  for (int key = warp % warps * kRows + lane / kParts; key < keys; key += kLoads * step) {
    Part<T> part[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (key + i * step < keys) part[i] = *reinterpret_cast<const Part<T>*>(from + (key + i * step) * p.k.row);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += to_acc(part[i].data[c]);
    }
  }
#pragma unroll
  for (int offset = kParts; offset < 32; offset *= 2) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], offset);
  }

  __shared__ float sums[kMaxWarps][kHeadDim];
  if (lane < kParts) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[warp][lane * kColumns + c] = sum[c];
  }
  __syncthreads();
  if (!complete) return;
  T* mean = static_cast<T*>(p.means) + index * kHeadDim;
  for (int column = warp % warps * 32 + lane; column < kHeadDim; column += warps * 32) {
    float total_sum = 0;
    for (int i = 0; i < warps; ++i) total_sum += sums[warp / warps * warps + i][column];
    mean[column] = from_acc<T>(total_sum / static_cast<float>(keys));
  }
}

template <class T, int kHeadDim>
cudaError_t launch(const MeansParams& p, cudaStream_t stream) {
  // Enough keys a warp for its loads, and enough warps for the blocks of long sequences, of which there are few.
  constexpr int kWarpKeys = kLoads * 32 * kColumns / kHeadDim;
  int warps = 1;
  while (warps < 8 && 2 * warps * kWarpKeys <= p.shape.block_size) warps *= 2;
  if (p.shape.block_size >= 2048) warps = kMaxWarps;
  const int cta_warps = std::max(warps, 8);
  const int64_t total = p.shape.units_k() * p.shape.blocks(), at_once = cta_warps / warps;
  const int64_t grid = (total + at_once - 1) / at_once;
  if (!fits_grid(grid) || p.shape.blocks() > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(block_means_kernel<T, kHeadDim>, {static_cast<unsigned>(grid), cta_warps * 32, 0}, stream, p,
                          static_cast<int>(p.shape.blocks()), warps, total);
}

}  // namespace

cudaError_t launch_block_means(const MeansParams& p, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kHalf) {
    return p.shape.head_dim == 64 ? launch<__half, 64>(p, stream) : launch<__half, 128>(p, stream);
  }
  return p.shape.head_dim == 64 ? launch<__nv_bfloat16, 64>(p, stream) : launch<__nv_bfloat16, 128>(p, stream);
}

}  // namespace moba::cuda::sm90
