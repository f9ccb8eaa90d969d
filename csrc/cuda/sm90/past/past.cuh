// Attention of gathered queries to the past blocks they chose, on Hopper: a producer warpgroup gathers queries
// (cp.async) and loads keys and values (TMA), each consumer warpgroup multiplies tiles of 64 queries, with an online
// softmax over the key tiles of larger blocks. Writes one partial output and lse per list entry, in list order. Every
// key of a past block is visible to every query of its list.
#pragma once

#include "cuda/sm90/dependent.cuh"
#include "cuda/sm90/past/consumer.cuh"
#include "cuda/sm90/past/producer.cuh"

namespace moba::cuda::sm90 {

template <class T, int kHeadDim, int kKeys, bool kResident>
__global__ void __launch_bounds__(Plan<kHeadDim, kKeys, kResident>::kThreads, 1)
    past_kernel(const __grid_constant__ PastParams p, const __grid_constant__ CUtensorMap map_k,
                const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_last_v,
                const __grid_constant__ Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Plan<kHeadDim, kKeys, kResident>;
  extern __shared__ __align__(1024) unsigned char dynamic_memory[];
  auto& memory = *reinterpret_cast<typename P::Memory*>(dynamic_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kShareSlots; ++i) {
      mbarrier_init(shared_address(&memory.share_full[i]), 1);
      mbarrier_init(shared_address(&memory.share_empty[i]), 1);
    }
    for (int i = 0; i < P::kTileSlots; ++i) {
      mbarrier_init(shared_address(&memory.tile_full[i]), 32 + 1);
      mbarrier_init(shared_address(&memory.tile_empty[i]), 4);
    }
    for (int i = 0; i < P::kQuerySlots; ++i) {
      mbarrier_init(shared_address(&memory.query_full[i]), 32 * kGatherers);
      mbarrier_init(shared_address(&memory.query_empty[i]), 4);
    }
    for (int i = 0; i < P::kKeySlots; ++i) {
      mbarrier_init(shared_address(&memory.key_empty[i]), 4 * P::kConsumers);
      mbarrier_init(shared_address(&memory.value_empty[i]), 4 * P::kConsumers);
    }
    for (int i = 0; i < P::kFullBarriers; ++i) {
      mbarrier_init(shared_address(&memory.key_full[i]), 1);
      mbarrier_init(shared_address(&memory.value_full[i]), 1);
    }
    fence_proxy_async();
  }
  __syncthreads();
  wait_for_earlier();
  let_next_start();
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_decrease<P::kProducerRegisters>();
    Producer<T, kHeadDim, kKeys, kResident> producer{p, schedule, &map_k, &map_v, &map_last_v, memory};
    producer.run();
  } else {
    setmaxnreg_increase<P::kConsumerRegisters>();
    Consumer<T, kHeadDim, kKeys, kResident> consumer{p, schedule, memory, static_cast<float>(p.softmax_scale) * kLog2e};
    consumer.run();
  }
#endif
}

template <class T, int kHeadDim, int kKeys, bool kResident>
cudaError_t Past<T, kHeadDim, kKeys, kResident>::launch(const PastParams& p, const KeyMaps& maps,
                                                        const Schedule& schedule, unsigned grid, cudaStream_t stream) {
  using P = Plan<kHeadDim, kKeys, kResident>;
  constexpr int kBytes = sizeof(typename P::Memory);
  const auto kernel = past_kernel<T, kHeadDim, kKeys, kResident>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  return launch_dependent(kernel, {grid, P::kThreads, kBytes}, stream, p, maps.k, maps.v, maps.last_v, schedule);
}

}  // namespace moba::cuda::sm90
