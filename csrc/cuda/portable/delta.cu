// delta = sum(dout * out) - dlse per row: what the derivative of the softmax subtracts. One warp per row.
#include "cuda/launch.h"
#include "cuda/portable/unit.cuh"

namespace moba::cuda {
namespace {

constexpr int kWarps = 8;

template <class T>
__global__ void __launch_bounds__(32 * kWarps) delta_kernel(DeltaParams p) {
  using A = acc_t<T>;
  const Shape& shape = p.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t local = index / shape.rows, row = index % shape.rows;
  if (local >= p.units.count) return;
  const int lane = threadIdx.x % 32;
  const int64_t unit = p.units.begin + local;
  const T* dout = unit_base<T>(p.dout, unit, shape.heads) + row * p.dout.row;
  const T* out = unit_base<T>(p.out, unit, shape.heads) + row * p.out.row;
  A sum = 0;
  for (int64_t column = lane; column < shape.head_dim; column += 32) sum += to_acc(dout[column]) * to_acc(out[column]);
  sum = warp_sum(sum);
  if (lane == 0) {
    static_cast<A*>(p.delta)[index] = sum - unit_base<A>(p.dlse, unit, shape.heads)[row * p.dlse.row];
  }
}

}  // namespace

cudaError_t launch_delta(const DeltaParams& p, Dtype dtype, cudaStream_t stream) {
  const int64_t grid = (p.units.count * p.shape.rows + kWarps - 1) / kWarps;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    delta_kernel<T><<<static_cast<unsigned>(grid), 32 * kWarps, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace moba::cuda
