#include "cuda/sm90/refusal.h"

#include <cuda_runtime_api.h>

#include <mutex>

#include "cuda/sm90/params.h"

namespace moba::cuda::sm90 {

namespace {

// Has shared memory only where the compiler had sm_90a, the target of all Hopper stages.
__global__ void probe_kernel(int* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ int word[256];
  word[threadIdx.x] = threadIdx.x;
  __syncthreads();
  *out = word[255 - threadIdx.x];
#endif
}

std::string refusal_of(int device) {
  int major = 0, minor = 0;
  cudaFuncAttributes attributes;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();  // not an error of the caller's
    return "device: wanted one that answers";
  }
  if (major != 9 || minor != 0) {
    return "device: wanted compute capability 9.0, got " + std::to_string(major) + "." + std::to_string(minor);
  }
  if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess || attributes.sharedSizeBytes == 0) {
    cudaGetLastError();
    return "build: wanted code for sm_90a (TORCH_CUDA_ARCH_LIST with 9.0a), got none";
  }
  return "";
}

// Asked before every call, so the answer is kept.
const std::string& device_refusal() {
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  static std::string answers[kDevices];
  static const std::string unknown = "device: wanted one that answers";
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) {
    cudaGetLastError();  // not an error of the caller's
    return unknown;
  }
  std::call_once(asked[device], [&] { answers[device] = refusal_of(device); });
  return answers[device];
}

}  // namespace

std::string refusal(const Shape& shape, double softmax_scale, Dtype dtype) {
  if (dtype != Dtype::kBFloat16 && dtype != Dtype::kHalf) return "dtype: wanted bfloat16 or float16";
  if (shape.head_dim != 64 && shape.head_dim != 128) {
    return "head_dim: wanted 64 or 128, got " + std::to_string(shape.head_dim);
  }
  if (shape.block_size % 16 != 0) {
    return "block_size: wanted a multiple of 16, got " + std::to_string(shape.block_size);
  }
  if (!(softmax_scale > 0)) return "softmax_scale: wanted more than 0, got " + std::to_string(softmax_scale);
  if (shape.heads_per_key_head() > kMaxGroup) {
    return "heads: wanted at most " + std::to_string(kMaxGroup) + " for each head of k, got " +
           std::to_string(shape.heads_per_key_head());
  }
  if (shape.rows > kMaxRows || shape.keys > INT32_MAX / 2 || capacity(shape) >= INT32_MAX ||
      shape.units() > INT32_MAX) {
    return "size: wanted at most " + std::to_string(kMaxRows) + " queries, and fewer than 2^31 chosen blocks in all " +
           "for each head of k, got " + std::to_string(shape.rows) + " and " + std::to_string(capacity(shape));
  }
  return device_refusal();
}

bool regular(const Source& source, int64_t groups, int64_t heads, int64_t rows) {
  const auto fits = [](int64_t count, int64_t stride) {
    return count <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 38);
  };
  return reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && fits(groups, source.group) && fits(heads, source.head) &&
         fits(rows, source.row);
}

}  // namespace moba::cuda::sm90
