// A call as the kernels see it: shape, dtype, stream, and its tensors as plain views.
// Part of ops.cpp, which includes libtorch's headers before it.
#pragma once

#include "check.h"
#include "cuda/params.h"
#include "cuda/sm90/tensor_map.h"

// As in ATen/cuda/CUDAContext.h, which would need the headers of cuBLAS and cuSPARSE too.
namespace at::cuda {
TORCH_CUDA_CPP_API cudaDeviceProp* getCurrentDeviceProperties();
TORCH_CUDA_CPP_API int warp_size();
}  // namespace at::cuda

namespace moba::cuda {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::kFloat;
    case at::kDouble: return Dtype::kDouble;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    default: TORCH_CHECK_TYPE(false, "q: wanted dtype Float, Double, BFloat16 or Half, got ", tensor.scalar_type());
  }
}

// Softmax, sums and lse.
inline at::TensorOptions accumulator(const Tensor& tensor) {
  return tensor.options().dtype(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

inline void check_supported(const Tensor& q, const Tensor& k) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(device->major >= 8, "q: wanted a device of compute capability 8.0 or newer, got ", device->name, " of ",
              device->major, ".", device->minor);
  TORCH_CHECK_VALUE(q.size(-1) <= kMaxHeadDim, "q: wanted head_dim of at most ", kMaxHeadDim, " on CUDA, got ",
                    q.size(-1));
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"q", q}, {"k", k}}) {
    const int64_t tokens = tensor.size(tensor.dim() == 3 ? 0 : 2);
    TORCH_CHECK_VALUE(tokens <= kMaxTokens, name, ": wanted at most ", kMaxTokens, " tokens, got ", tokens);
  }
}

inline bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

// One copy to the host, made by the first operator of a call: _route, or _attend where there is none. Not
// possible while a graph is captured, where the kernels clamp what they read.
inline void check_boundaries(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  if (!cu_seqlens_q.has_value() || capturing()) return;
  const Tensor both = at::stack({*cu_seqlens_q, *cu_seqlens_k}).cpu();
  check_cu_seqlens(both[0], both[1], q.size(0), k.size(0), max_seqlen_q, max_seqlen_k);
}

// What all stages of one call share. Holds the tensors that its pointers point to.
class Problem {
 public:
  Problem(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
          int64_t block_size, int64_t slots)
      : packed_(cu_seqlens_q.has_value()), stream_(c10::cuda::getCurrentCUDAStream()), dtype_(dtype_of(q)) {
    if (packed_) {
      cu_seqlens_q_ = cu_seqlens_q->contiguous();
      cu_seqlens_k_ = cu_seqlens_k->contiguous();
    }
    const int64_t token_dim = packed_ ? 0 : 2;
    shape_ = Shape{
        .groups = packed_ ? 1 : q.size(0),
        .heads = q.size(1),
        .heads_k = k.size(1),
        .head_dim = q.size(-1),
        .rows = q.size(token_dim),
        .keys = k.size(token_dim),
        .sequences = packed_ ? cu_seqlens_q_.numel() - 1 : 1,
        .cu_seqlens_q = packed_ ? cu_seqlens_q_.const_data_ptr<int32_t>() : nullptr,
        .cu_seqlens_k = packed_ ? cu_seqlens_k_.const_data_ptr<int32_t>() : nullptr,
        // One block as long as all keys serves for any longer one; rounded up, as kernels want multiples of 16.
        .block_size = std::min(block_size, std::max<int64_t>(1, ceil_divide(k.size(token_dim), 16)) * 16),
        .slots = slots,
    };
  }

  const Shape& shape() const { return shape_; }
  Dtype dtype() const { return dtype_; }
  cudaStream_t stream() const { return stream_; }
  bool empty() const { return shape_.units() == 0 || shape_.rows == 0 || shape_.keys == 0 || shape_.sequences == 0; }

  // Nobody has checked that the sequences hold all tokens, and kernels write to no others.
  bool unchecked() const { return packed_ && capturing(); }

  // q, k, v and their like: [batch, heads, tokens, head_dim] or [tokens, heads, head_dim].
  Source rows(const Tensor& tensor) const {
    return packed_ ? Source{tensor.const_data_ptr(), 0, tensor.stride(1), tensor.stride(0)}
                   : Source{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
  // route, lse and their like: [batch, heads, tokens, ..] or [heads, tokens, ..].
  Source per_query(const Tensor& tensor) const {
    return packed_ ? Source{tensor.const_data_ptr(), 0, tensor.stride(0), tensor.stride(1)}
                   : Source{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
  // The Hopper stages want rows at multiples of 16 bytes, which few tensors do not have and a copy always has.
  Tensor regular_q(const Tensor& tensor) const { return regular(tensor, shape_.heads, shape_.rows); }
  Tensor regular_k(const Tensor& tensor) const { return regular(tensor, shape_.heads_k, shape_.keys); }

  Target rows_out(const Tensor& tensor) const { return writable(tensor, rows(tensor)); }
  Target per_query_out(const Tensor& tensor) const { return writable(tensor, per_query(tensor)); }

 private:
  Tensor regular(const Tensor& any, int64_t heads, int64_t tokens) const {
    const Tensor tensor = with_contiguous_rows(any);
    const bool good = sm90::regular(rows(tensor), {shape_.groups, heads, tokens, shape_.head_dim});
    return good ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
  }

  static Target writable(const Tensor& tensor, const Source& view) {
    return {tensor.mutable_data_ptr(), view.group, view.head, view.row};
  }

  bool packed_;
  cudaStream_t stream_;
  Dtype dtype_;
  Tensor cu_seqlens_q_, cu_seqlens_k_;
  Shape shape_;
};

}  // namespace moba::cuda
