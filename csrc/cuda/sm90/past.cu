// Which past kernel takes a call, and the tensor maps and schedule it needs.
#include <cudaTypedefs.h>

#include <algorithm>

#include "cuda/portable/numeric.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/past.h"

namespace moba::cuda::sm90 {

namespace {

// Queries, keys and values of the units of one pass, to stay in the L2 cache (50 MB, of which reads of more than about
// half run at lower speed).
constexpr int64_t kPassBytes = int64_t(20) << 20;
constexpr int64_t kMaxPassUnits = 64;

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

// Keys or values as [group, head, key, column], in boxes of one panel of `keys` keys.
cudaError_t make_map(CUtensorMap& map, const Source& source, const Shape& shape, int keys, Dtype dtype) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encode_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto positive = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  const cuuint64_t sizes[4] = {positive(shape.head_dim), positive(shape.keys), positive(shape.heads_k),
                               positive(shape.groups)};
  // The stride of a dimension of one element is never used, but has to be valid.
  const auto bytes = [&](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>((count > 1 ? stride : shape.head_dim) * 2);
  };
  const cuuint64_t strides[3] = {bytes(shape.keys, source.row), bytes(shape.heads_k, source.head),
                                 bytes(shape.groups, source.group)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(keys), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, dtype == Dtype::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(source.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Rows that start at 16 bytes, and strides that a tensor map can hold.
bool regular(const Source& source, int64_t groups, int64_t heads, int64_t rows) {
  const auto fits = [](int64_t count, int64_t stride) {
    return count <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 38);
  };
  return reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && fits(groups, source.group) && fits(heads, source.head) &&
         fits(rows, source.row);
}

template <class F>
auto with_kernel(const Shape& shape, Dtype dtype, F f) {
  const auto by_block = [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (shape.block_size <= 64) return f(Past<T, kHeadDim, 64, true>{}, 64);
    if (shape.block_size <= 128) return f(Past<T, kHeadDim, 128, true>{}, 128);
    return f(Past<T, kHeadDim, 128, false>{}, 128);
  };
  const auto by_head_dim = [&](auto type) {
    return shape.head_dim == 64 ? by_block(type, std::integral_constant<int, 64>{})
                                : by_block(type, std::integral_constant<int, 128>{});
  };
  return dtype == Dtype::kHalf ? by_head_dim(Type<__half>{}) : by_head_dim(Type<__nv_bfloat16>{});
}

}  // namespace

bool accepts(const Shape& shape, const Source& q, const Source& k, const Source& v, double softmax_scale, Dtype dtype) {
  if (dtype != Dtype::kBFloat16 && dtype != Dtype::kHalf) return false;
  if (shape.head_dim != 64 && shape.head_dim != 128) return false;
  if (shape.block_size % 16 != 0 || !(softmax_scale > 0)) return false;
  if (shape.rows > kMaxRows || shape.heads_per_key_head() > kMaxGroup || capacity(shape) > INT32_MAX - kListTile) {
    return false;
  }
  if (shape.keys > INT32_MAX - shape.block_size || shape.units() > INT32_MAX || q.row > INT32_MAX) return false;
  if (!regular(q, shape.groups, shape.heads, shape.rows) || !regular(k, shape.groups, shape.heads_k, shape.keys) ||
      !regular(v, shape.groups, shape.heads_k, shape.keys)) {
    return false;
  }
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return major == 9 && minor == 0 &&
         with_kernel(shape, dtype, [](auto past, int) { return decltype(past)::built(); });
}

cudaError_t launch_past(const PastParams& p, Dtype dtype, cudaStream_t stream) {
  const Shape& shape = p.shape;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t unit_bytes = (shape.rows * shape.heads_per_key_head() + 2 * shape.keys) * shape.head_dim * 2;
  const int64_t pass_units = std::min<int64_t>(std::max<int64_t>(1, kPassBytes / unit_bytes), kMaxPassUnits);
  return with_kernel(shape, dtype, [&](auto past, int keys) {
    const int steps = static_cast<int>((shape.block_size + keys - 1) / keys);
    const Schedule schedule{
        .pass_units = static_cast<int>(std::min(pass_units, p.lists.units_k.count)),
        .blocks = static_cast<int>(shape.blocks()),
        .heads_k = static_cast<int>(shape.heads_k),
        .group = static_cast<int>(shape.heads_per_key_head()),
        .steps = steps,
        .last_keys = static_cast<int>(shape.block_size - static_cast<int64_t>(steps - 1) * keys),
        .row_bytes = static_cast<uint32_t>(p.q.row * 2),
    };
    KeyMaps maps;
    cudaError_t made = make_map(maps.k, p.k, shape, keys, dtype);
    if (made == cudaSuccess) made = make_map(maps.v, p.v, shape, keys, dtype);
    if (made == cudaSuccess) made = make_map(maps.last_v, p.v, shape, schedule.last_keys, dtype);
    return made != cudaSuccess ? made
                               : decltype(past)::launch(p, maps, schedule, static_cast<unsigned>(processors), stream);
  });
}

}  // namespace moba::cuda::sm90
