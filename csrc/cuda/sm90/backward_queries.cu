// dq: from the sums in memory, or as the sum of the partials of each row in the order of its slots. head_dim / 8 lanes
// hold a row; in the permuted order of the products, so four lanes exchange what they hold of 32 columns at the end.
#include "cuda/sm90/backward_exact.cuh"
#include "cuda/sm90/backward_store.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreadsPerBlock = 256;
constexpr int kColumns = 8;  // of a lane: columns 8 g + 2 j + e of each 32, for lane j of four

template <class T, int kHeadDim, bool kReduce>
struct Row {
  static constexpr int kLanes = kHeadDim / kColumns;
  const BackwardParams& p;
  const Workspace& work;
  const Pass& pass;
  int64_t index, head_row, unit_k;  // of the workspace; of the key head
  int lane;

  __device__ __forceinline__ void load(float (&values)[kColumns], float scale) const {
    const float4* from = reinterpret_cast<const float4*>(work.sums + index * kHeadDim) + lane / 4 * 8 + lane % 4;
    const float4 a = from[0], b = from[4];
    values[0] = a.x * scale, values[1] = a.y * scale, values[2] = a.z * scale, values[3] = a.w * scale;
    values[4] = b.x * scale, values[5] = b.y * scale, values[6] = b.z * scale, values[7] = b.w * scale;
  }
  __device__ __forceinline__ void keep(const float (&values)[kColumns]) const {
    float4* to = reinterpret_cast<float4*>(work.sums + index * kHeadDim) + lane / 4 * 8 + lane % 4;
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[4] = make_float4(values[4], values[5], values[6], values[7]);
  }

  __device__ __forceinline__ void add(float (&values)[kColumns], int64_t tile, int64_t at) const {
    const T* partials = static_cast<const T*>(work.partials) +
                        ((tile * p.lists.units_k.count + unit_k) * partial_rows(p.shape) + at) * kHeadDim;
    const uint4 words = __ldcs(reinterpret_cast<const uint4*>(partials) + lane);
    const T* parts = reinterpret_cast<const T*>(&words);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] += to_acc(parts[i]);
  }

  // Key tiles of the pass with a key that the row sees.
  __device__ __forceinline__ int64_t own_tiles(int64_t row) const {
    const Sequence sequence = sequence_of_row(p.shape, row);
    const int64_t position = sequence.position(row);
    if (position < 0) return 0;
    return min(position % p.shape.block_size / kKeyTile + 1 - pass.tile_begin, int64_t(pass.tiles));
  }
};

template <class T, int kHeadDim, bool kReduce>
__global__ void __launch_bounds__(kThreadsPerBlock)
    queries_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work, Pass pass) {
  using R = Row<T, kHeadDim, kReduce>;
  const Shape& shape = p.shape;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreadsPerBlock + threadIdx.x) / R::kLanes;
  const int64_t local = index / shape.rows, row = index - local * shape.rows;
  // All four lanes of a row leave together, but not all lanes of a warp.
  const bool exists = local < p.lists.units_k.count * shape.heads_per_key_head();
  const int64_t unit_k = local / shape.heads_per_key_head(), head = local - unit_k * shape.heads_per_key_head();
  const R here{p, work, pass, index, head * shape.rows + row, unit_k, static_cast<int>(threadIdx.x % R::kLanes)};
  float values[kColumns] = {};
  if (exists) {
    if constexpr (kReduce) {
      here.load(values, static_cast<float>(p.softmax_scale));
    } else {
      if (!pass.first) here.load(values, 1.f);
      const int32_t* positions = p.lists.positions + index * shape.slots;
      for (int64_t slot = 0; slot < shape.slots; ++slot) {
        const int32_t position = positions[slot];
        if (position < 0) continue;
        for (int64_t tile = 0; tile < pass.tiles; ++tile) here.add(values, tile, position);
      }
      const int64_t own = here.own_tiles(row);
      for (int64_t tile = 0; tile < own; ++tile) here.add(values, tile, capacity(shape) + here.head_row);
      if (!pass.last) {
        here.keep(values);
        return;
      }
    }
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  transpose(words);
  if (!exists) return;
  const Exact<T, kHeadDim> exact(p, work);
  if (exact.any_broken(values)) {
    exact.query(values, local, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  }
  T* dq = unit_base<T>(p.dq, p.lists.units_k.begin * shape.heads_per_key_head() + local, shape.heads) + row * p.dq.row +
          here.lane / 4 * 32 + here.lane % 4 * kColumns;
  *reinterpret_cast<uint4*>(dq) = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T, int kHeadDim>
cudaError_t launch(const BackwardParams& p, const Workspace& work, const Pass& pass, bool reduce, cudaStream_t stream) {
  const int64_t threads = p.lists.units_k.count * heads_rows(p.shape) * (kHeadDim / kColumns);
  const int64_t grid = (threads + kThreadsPerBlock - 1) / kThreadsPerBlock;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  const auto kernel = reduce ? queries_kernel<T, kHeadDim, true> : queries_kernel<T, kHeadDim, false>;
  kernel<<<static_cast<unsigned>(grid), kThreadsPerBlock, 0, stream>>>(p, work, pass);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_queries(const BackwardParams& p, const Workspace& work, const Pass& pass, bool reduce, Dtype dtype,
                           cudaStream_t stream) {
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) {
    return wide ? launch<__half, 128>(p, work, pass, reduce, stream)
                : launch<__half, 64>(p, work, pass, reduce, stream);
  }
  return wide ? launch<__nv_bfloat16, 128>(p, work, pass, reduce, stream)
              : launch<__nv_bfloat16, 64>(p, work, pass, reduce, stream);
}

}  // namespace moba::cuda::sm90::backward
