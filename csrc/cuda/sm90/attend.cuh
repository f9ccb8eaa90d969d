// Attention per key block on Hopper: the producer warpgroup gathers queries (cp.async) and loads keys and values (TMA),
// each consumer warpgroup multiplies tiles of 64 queries, with an online softmax over the key tiles of larger blocks.
// Writes one partial output and lse per list entry. Terms that are masked have probability 0 but are multiplied in, so
// a partial that came out as NaN or infinite is recomputed by the merge: see merge.cu.
#pragma once

#include "cuda/sm90/consumer.cuh"
#include "cuda/sm90/producer.cuh"

namespace moba::cuda::sm90 {

template <class T, int kHeadDim, int kKeys, bool kResident>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ CUtensorMap map_k,
                  const __grid_constant__ CUtensorMap map_v, const __grid_constant__ Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Plan<kHeadDim, kKeys>;
  extern __shared__ __align__(1024) unsigned char dynamic_memory[];
  auto& memory = *reinterpret_cast<typename P::Memory*>(dynamic_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kQuerySlots; ++i) {
      mbarrier_init(shared_address(&memory.query_full[i]), kWarpgroup + 4);
      mbarrier_init(shared_address(&memory.query_empty[i]), 4);
    }
    for (int i = 0; i < P::kKeySlots; ++i) {
      mbarrier_init(shared_address(&memory.key_full[i]), 1);
      mbarrier_init(shared_address(&memory.key_empty[i]), 4 * kConsumers);
      mbarrier_init(shared_address(&memory.value_full[i]), 1);
      mbarrier_init(shared_address(&memory.value_empty[i]), 4 * kConsumers);
    }
    fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_decrease<kProducerRegisters>();
    Producer<T, kHeadDim, kKeys, kResident> producer{p, schedule, &map_k, &map_v, memory};
    producer.run();
  } else {
    setmaxnreg_increase<kConsumerRegisters>();
    Consumer<T, kHeadDim, kKeys, kResident> consumer{p, memory, static_cast<float>(p.softmax_scale) * kLog2e};
    consumer.run();
  }
#endif
}

template <class T, int kHeadDim, int kKeys, bool kResident>
bool Attend<T, kHeadDim, kKeys, kResident>::built() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, attend_kernel<T, kHeadDim, kKeys, kResident>) != cudaSuccess) {
    cudaGetLastError();  // not an error of the caller's
    return false;
  }
  return attributes.numRegs > 64;  // elsewhere the kernel is empty
}

template <class T, int kHeadDim, int kKeys, bool kResident>
cudaError_t Attend<T, kHeadDim, kKeys, kResident>::launch(const AttendParams& p, const CUtensorMap& map_k,
                                                          const CUtensorMap& map_v, const Schedule& schedule,
                                                          unsigned grid, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Plan<kHeadDim, kKeys>::Memory);
  const auto kernel = attend_kernel<T, kHeadDim, kKeys, kResident>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, kThreads, kBytes, stream>>>(p, map_k, map_v, schedule);
  return cudaGetLastError();
}

}  // namespace moba::cuda::sm90
