// The current-block kernel: see docs/kernels.md.
#pragma once

#include "cuda/sm90/current/choice.cuh"
#include "cuda/sm90/current/consumer.cuh"
#include "cuda/sm90/current/producer.cuh"
#include "cuda/sm90/dependent.cuh"

namespace moba::cuda::sm90::current {

template <class T, int kHeadDim, Mode kMode>
__global__ void __launch_bounds__(Plan<kHeadDim, kMode>::kThreads, 1)
    current_kernel(const __grid_constant__ CurrentParams p, const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                   const __grid_constant__ Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Plan<kHeadDim, kMode>;
  constexpr int kConsumers = P::kConsumers * kWarpgroup, kWarps = kConsumers / 32;
  extern __shared__ __align__(1024) unsigned char dynamic_memory[];
  auto& memory = *reinterpret_cast<typename P::Memory*>(dynamic_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kQuerySlots; ++i) {
      mbarrier_init(shared_address(&memory.query_full[i]), 1);
      mbarrier_init(shared_address(&memory.query_empty[i]), kConsumers);
    }
    for (int i = 0; i < P::kKeySlots; ++i) {
      mbarrier_init(shared_address(&memory.key_full[i]), 1);
      mbarrier_init(shared_address(&memory.key_empty[i]), kWarps);
      mbarrier_init(shared_address(&memory.value_full[i]), 1);
      mbarrier_init(shared_address(&memory.value_empty[i]), kWarps);
    }
    if constexpr (P::kPast) {
      for (int i = 0; i < P::kConsumers * P::kStages; ++i) {
        mbarrier_init(shared_address(&memory.past.full[0][0] + i), kRows / kGatherRows * (32 + 1));
        mbarrier_init(shared_address(&memory.past.empty[0][0] + i), kWarpgroup);
      }
    }
    if constexpr (P::kMasked) {
      for (int i = 0; i < kChoices; ++i) {
        mbarrier_init(shared_address(&memory.chosen.full[i]), P::kConsumers * 32);
        mbarrier_init(shared_address(&memory.chosen.empty[i]), kConsumers + 1);
      }
    }
    fence_proxy_async();
  }
  __syncthreads();
  wait_for_earlier();
  let_next_start();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup < P::kProducers) {
    setmaxnreg_decrease<P::kProducerRegisters>();
    if (threadIdx.x == 0) {
      Loader<kHeadDim, kMode> loader{p, schedule, &map_q, &map_k, &map_v, memory};
      loader.run();
    }
    if constexpr (P::kMasked) {
      const int consumer = static_cast<int>(threadIdx.x) / 32 - 1;
      if (consumer >= 0 && consumer < P::kConsumers) {
        Chooser<kHeadDim> chooser{p, schedule, memory, consumer};
        chooser.run();
      }
    }
    if constexpr (P::kPast) {
      if (warpgroup == 1) {
        const int warp = threadIdx.x % kWarpgroup / 32;
        Gatherer<T, kHeadDim, kMode> gatherer{p, schedule, memory, warp / 2, warp % 2};
        gatherer.run();
      }
    }
  } else {
    setmaxnreg_increase<P::kConsumerRegisters>();
    Consumer<T, kHeadDim, kMode> consumer{p, schedule, memory, warpgroup - P::kProducers,
                                          static_cast<float>(p.softmax_scale) * kLog2e};
    consumer.run();
  }
#endif
}

template <class T, int kHeadDim, Mode kMode>
cudaError_t Current<T, kHeadDim, kMode>::launch(const CurrentParams& p, const CUtensorMap& map_q,
                                                const CUtensorMap& map_k, const CUtensorMap& map_v,
                                                const Schedule& schedule, unsigned grid, cudaStream_t stream) {
  using P = Plan<kHeadDim, kMode>;
  constexpr int kBytes = sizeof(typename P::Memory);
  const auto kernel = current_kernel<T, kHeadDim, kMode>;
  static SharedMemory shared;
  const cudaError_t status = shared.allow(reinterpret_cast<const void*>(kernel), kBytes);
  if (status != cudaSuccess) return status;
  return launch_dependent(kernel, {grid, P::kThreads, kBytes}, stream, p, map_q, map_k, map_v, schedule);
}

}  // namespace moba::cuda::sm90::current
