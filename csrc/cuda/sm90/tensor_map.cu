#include <cudaTypedefs.h>

#include "cuda/sm90/tensor_map.h"

namespace moba::cuda::sm90 {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

bool regular(const Source& source, const Extent& extent) {
  const auto fits = [](int64_t count, int64_t stride) {
    return count <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 38);
  };
  // The backward pass counts parts of 16 bytes from the first row in 32 bits.
  const int64_t last = (extent.heads - 1) * source.head + (extent.rows - 1) * source.row;
  return reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && fits(extent.groups, source.group) &&
         fits(extent.heads, source.head) && fits(extent.rows, source.row) && source.row <= INT32_MAX &&
         last / 8 <= INT32_MAX;
}

cudaError_t make_tensor_map(CUtensorMap& map, const Source& source, const Extent& extent, int box_rows, Dtype dtype) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encode_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto positive = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  const cuuint64_t sizes[4] = {positive(extent.head_dim), positive(extent.rows), positive(extent.heads),
                               positive(extent.groups)};
  // The stride of a dimension of one element is never used, but has to be valid.
  const auto bytes = [&](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>((count > 1 ? stride : extent.head_dim) * 2);
  };
  const cuuint64_t strides[3] = {bytes(extent.rows, source.row), bytes(extent.heads, source.head),
                                 bytes(extent.groups, source.group)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, dtype == Dtype::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(source.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace moba::cuda::sm90
