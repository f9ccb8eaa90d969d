// Kernels that start while the one before them in the stream ends (programmatic dependent launch). Each begins with
// wait_for_earlier, so that what any earlier kernel wrote is there, as in a stream without it.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace moba::cuda::sm90 {

// Nothing in code for older GPUs, which is compiled of some of these kernels and never launched.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From all CTAs: the next kernel may take what multiprocessors have free.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Launch {
  unsigned ctas;
  int threads, shared_bytes, cluster = 1;
};

// Lets one kernel have more dynamic shared memory than all have. Asking the driver takes half a microsecond, a tenth of
// a launch, so it is asked once a device.
class SharedMemory {
 public:
  cudaError_t allow(const void* kernel, int bytes) {
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
    if ((devices_.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess) devices_.fetch_or(bit, std::memory_order_relaxed);
    return status;
  }

 private:
  std::atomic<uint64_t> devices_{0};
};

template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), const Launch& launch, cudaStream_t stream,
                             Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.ctas);
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = launch.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace moba::cuda::sm90
