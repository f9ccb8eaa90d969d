// What the products need of each query row: lse to base 2 and delta = sum(dout * out) - dlse. head_dim / 8 lanes hold a
// row, 16 bytes each. Runs while the items are cut: the one thread block that does that lets this kernel start when all
// earlier kernels are complete.
#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward/work.h"
#include "cuda/sm90/dependent.cuh"

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
    prepare_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work, int unit_blocks,
                   bool reduce) {
  constexpr int kLanes = kHeadDim / kColumns;
  let_next_start();
  if (blockIdx.x + 1 == gridDim.x) wait_for_earlier();  // so that this kernel ends after the items are cut
  const Shape& shape = p.shape;
  const int block = static_cast<int>(blockIdx.x), local = block / unit_blocks;
  const int64_t row = static_cast<int64_t>(block - local * unit_blocks) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= shape.rows) return;
  const int64_t index = local * shape.rows + row;
  const int lane = threadIdx.x % kLanes;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  const int64_t unit = p.lists.units_k.begin * work.heads + local;
  // All loads at once.
  const auto load = [&](const Source& source) {
    return *reinterpret_cast<const Part<T>*>(unit_rows<T>(source, unit, shape.heads) + row * source.row +
                                             lane * kColumns);
  };
  const Part<T> dout = load(p.dout), out = load(p.out);
  float lse = 0, dlse = 0;
  if (lane == 0) {
    lse = unit_rows<float>(p.lse, unit, shape.heads)[row * p.lse.row];
    dlse = unit_rows<float>(p.dlse, unit, shape.heads)[row * p.dlse.row];
  }
  const int slots = static_cast<int>(shape.slots);
  bool current = false;
  for (int slot = lane; slot < slots; slot += kLanes) {
    current |= p.lists.positions[index * slots + slot] == kCurrent;
  }
  if (reduce) {
    float4* sums = reinterpret_cast<float4*>(work.sums + index * kHeadDim) + lane;
    sums[0] = sums[kLanes] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += to_acc(dout.data[i]) * to_acc(out.data[i]);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(lanes, sum, offset);
  current = __any_sync(lanes, current);
  if (lane > 0) return;
  // exp2(score - inf) is 0.
  const float base = lse == -INFINITY ? INFINITY : lse * kLog2e;
  work.lse[index] = base;
  work.own_lse[index] = current ? base : INFINITY;
  work.delta[index] = sum - dlse;
  if (index == 0) work.counters->broken = 0;
}

}  // namespace

cudaError_t launch_prepare(const BackwardParams& p, const Workspace& work, bool reduce, Dtype dtype,
                           cudaStream_t stream) {
  const int64_t block_rows = kThreads * kColumns / p.shape.head_dim;
  const int64_t unit_blocks = (p.shape.rows + block_rows - 1) / block_rows;
  const int64_t grid = p.lists.units_k.count * work.heads * unit_blocks;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  const auto launch = [&](auto kernel) {
    return launch_dependent(kernel, {static_cast<unsigned>(grid), kThreads, 0}, stream, p, work,
                            static_cast<int>(unit_blocks), reduce);
  };
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) return wide ? launch(prepare_kernel<__half, 128>) : launch(prepare_kernel<__half, 64>);
  return wide ? launch(prepare_kernel<__nv_bfloat16, 128>) : launch(prepare_kernel<__nv_bfloat16, 64>);
}

}  // namespace moba::cuda::sm90::backward
