// Element types and the few numeric operations that depend on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/params.h"

namespace moba::cuda {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float x) {
  return __float2half(x);
}

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// The larger number; NaN only if both are.
__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double maximum(double a, double b) { return fmax(a, b); }

// What to subtract before exp: the maximum, but never minus infinity, as -inf - -inf is NaN.
template <class A>
__device__ __forceinline__ A finite_base(A maximum) {
  return maximum == minus_infinity<A>() ? A(0) : maximum;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Calls f with a value of a type that carries the element type.
template <class T>
struct Type {
  using type = T;
};
template <class F>
cudaError_t with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat: return f(Type<float>{});
    case Dtype::kDouble: return f(Type<double>{});
    case Dtype::kBFloat16: return f(Type<__nv_bfloat16>{});
    case Dtype::kHalf: return f(Type<__half>{});
  }
  return cudaErrorInvalidValue;
}

// Everything that can be large is counted on grid x.
inline bool fits_grid(int64_t count) { return count > 0 && count <= INT32_MAX; }

}  // namespace moba::cuda
