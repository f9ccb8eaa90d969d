#include <cuda_runtime_api.h>

#include <cfloat>
#include <mutex>
#include <sstream>

#include "cuda/sm90/params.h"
#include "cuda/sm90/refusal.h"

namespace moba::cuda::sm90 {

namespace {

constexpr int64_t kMaxBlocks = int64_t(1) << 19;  // the gate numbers groups of 8 in 16 bits

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
  // In float; one that is 0 there would make NaN of the scores that are left out.
  if (!(softmax_scale >= FLT_MIN)) {
    std::ostringstream got;
    got << softmax_scale;
    return "softmax_scale: wanted more than 0 (1.2e-38 at least), got " + got.str();
  }
  if (shape.heads_per_key_head() > kMaxGroup) {
    return "heads: wanted at most " + std::to_string(kMaxGroup) + " for each head of k, got " +
           std::to_string(shape.heads_per_key_head());
  }
  // Numbers of rows, keys, blocks, tiles and entries have to fit 32 bits, with room for rounding up.
  constexpr int64_t kMany = INT32_MAX / 4;
  const int64_t key_tiles = shape.units_k() * (shape.blocks() + shape.keys / 64);
  const int64_t row_tiles = shape.units() * (shape.rows / 64 + shape.sequences);
  if (shape.rows >= kMaxRows || shape.keys > kMany || shape.block_size > kMany || shape.blocks() > kMaxBlocks ||
      capacity(shape) > kMany || key_tiles > kMany || row_tiles > kMany) {
    return "size: wanted fewer than 2^27 queries and 2^19 blocks, and 2^29 keys and chosen blocks of a head of k, "
           "got " +
           std::to_string(shape.rows) + ", " + std::to_string(shape.blocks()) + ", " + std::to_string(shape.keys) +
           " and " + std::to_string(capacity(shape));
  }
  return device_refusal();
}

}  // namespace moba::cuda::sm90
