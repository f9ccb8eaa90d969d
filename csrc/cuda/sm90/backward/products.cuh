// The products of the backward pass: persistent CTAs that take items of work.
#pragma once

#include "cuda/sm90/backward/consumer.cuh"
#include "cuda/sm90/backward/producer.cuh"
#include "cuda/sm90/dependent.cuh"

namespace moba::cuda::sm90::backward {

template <class T, int kHeadDim, bool kReduce>
__global__ void __launch_bounds__(kThreads, 1)
    products_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char dynamic_memory[];
  auto& memory = *reinterpret_cast<Memory<kHeadDim>*>(dynamic_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Memory<kHeadDim>::kStages; ++i) {
      mbarrier_init(shared_address(&memory.full[i]), 2 * kWarpgroup);  // copies, and what is stored
      mbarrier_init(shared_address(&memory.empty[i]), kConsumerThreads);
    }
    mbarrier_init(shared_address(&memory.keys_full), kWarpgroup);
    mbarrier_init(shared_address(&memory.keys_empty), kConsumerThreads);
    fence_proxy_async();
  }
  __syncthreads();
  wait_for_earlier();
  let_next_start();
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_decrease<Memory<kHeadDim>::kProducerRegisters>();
    Producer<T, kHeadDim, kReduce> producer{p, work, memory};
    producer.run();
  } else {
    setmaxnreg_increase<Memory<kHeadDim>::kConsumerRegisters>();
    const int half = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / kWarpgroup), 0) - 1;
    Consumer<T, kHeadDim, kReduce> consumer{p, work, memory, static_cast<float>(p.softmax_scale) * kLog2e, half};
    consumer.run();
  }
#endif
}

template <class T, int kHeadDim>
cudaError_t Products<T, kHeadDim>::launch(const BackwardParams& p, const Workspace& work, bool reduce, int processors,
                                          cudaStream_t stream) {
  constexpr int kBytes = sizeof(Memory<kHeadDim>);
  const auto kernel = reduce ? products_kernel<T, kHeadDim, true> : products_kernel<T, kHeadDim, false>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  return launch_dependent(kernel, {static_cast<unsigned>(processors), kThreads, kBytes}, stream, p, work);
}

}  // namespace moba::cuda::sm90::backward
