// dk and dv of the key tiles that several items share, or none: the sum of the slabs, in the order of the shares.
#include "cuda/portable/numeric.cuh"
#include "cuda/sm90/backward/store.cuh"
#include "cuda/sm90/dependent.cuh"

namespace moba::cuda::sm90::backward {
namespace {

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kConsumerThreads)
    splits_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work) {
  wait_for_earlier();
  let_next_start();
  const int splits = work.counters->splits;
  for (int i = blockIdx.x; i < 2 * splits; i += gridDim.x) {
    const Item item = work.splits[i / 2];
    const int which = i % 2;  // dk or dv
    float sums[kHeadDim / 2] = {};
    for (int share = 0; share < item.shares; ++share) {
      const float4* from = slab_at<kHeadDim>(work.slabs, item.slab + share, which, threadIdx.x);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const float4 part = from[j * kConsumerThreads];
        sums[4 * j] += part.x;
        sums[4 * j + 1] += part.y;
        sums[4 * j + 2] += part.z;
        sums[4 * j + 3] += part.w;
      }
    }
    if (!all_finite(sums)) work.counters->broken = 1;
    store_rows<T, kHeadDim>(sums, which == 0 ? static_cast<float>(p.softmax_scale) : 1.f, which == 0 ? p.dk : p.dv,
                            p.shape, p.lists.units_k.begin + item.unit_k, item.key_begin, item.keys, threadIdx.x);
  }
}

}  // namespace

cudaError_t launch_splits(const BackwardParams& p, const Workspace& work, int processors, Dtype dtype,
                          cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    return launch_dependent(kernel, {static_cast<unsigned>(2 * processors), kConsumerThreads, 0}, stream, p, work);
  };
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) return wide ? launch(splits_kernel<__half, 128>) : launch(splits_kernel<__half, 64>);
  return wide ? launch(splits_kernel<__nv_bfloat16, 128>) : launch(splits_kernel<__nv_bfloat16, 64>);
}

}  // namespace moba::cuda::sm90::backward
