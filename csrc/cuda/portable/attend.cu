// Attention per key block: a tile of 64 gathered queries against the keys of the block they chose, with an online
// softmax. Writes one partial output and lse per list entry.
#include "cuda/launch.h"
#include "cuda/portable/list_tile.cuh"

namespace moba::cuda {
namespace {

// kGroups: head_dim in groups of 64 columns, rounded up to 1, 2 or 4.
template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads) attend_kernel(AttendParams p, bool aligned) {
  using A = acc_t<T>;
  const Shape& shape = p.shape;
  const int64_t tiles = max_tiles(shape), blocks = shape.blocks();
  const int64_t local = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t unit = p.units.begin + local;
  const int64_t list = unit - p.lists.units.begin;
  const int64_t* tile_begin = p.lists.tile_begin + list * (blocks + 1);
  const int64_t* list_begin = p.lists.list_begin + list * (blocks + 1);
  const int64_t number = block_of_tile(tile_begin, blocks, tile);
  if (number < 0) return;
  const Block block = block_at(shape, number);
  const int64_t first = list_begin[number] + (tile - tile_begin[number]) * kTile;
  const int count = static_cast<int>(min(int64_t(kTile), list_begin[number + 1] - first));

  extern __shared__ __align__(16) unsigned char memory[];
  A* slice_a = reinterpret_cast<A*>(memory);
  A* slice_b = slice_a + kSlice * kPitch;
  A* weights = slice_b + kSlice * kPitch;
  __shared__ Gathered queries;
  gather(queries, p.lists.entries + list * shape.entries() + first, count, shape.slots, block.sequence);
  __syncthreads();

  const int columns = static_cast<int>(shape.head_dim);
  const A scale = static_cast<A>(p.softmax_scale);
  const int64_t unit_k = unit / shape.heads_per_key_head();
  const T* q = unit_base<T>(p.q, unit, shape.heads);
  const T* k = unit_base<T>(p.k, unit_k, shape.heads_k) + block.key_begin * p.k.row;
  const T* v = unit_base<T>(p.v, unit_k, shape.heads_k) + block.key_begin * p.v.row;
  const auto query = [&](int i) { return i < count ? q + queries.row[i] * p.q.row : nullptr; };
  const int64_t block_position = block.key_begin - block.sequence.key_begin;
  const int64_t first_position = queries.position[0];
  const int64_t keys = min(block.keys, queries.position[count - 1] + 1 - block_position);

  A out[kGroups][4][4] = {};
  A largest[4], sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest[i] = minus_infinity<A>();
    sum[i] = 0;
  }
  for (int64_t key0 = 0; key0 < keys; key0 += kTile) {
    const int here = static_cast<int>(min(int64_t(kTile), keys - key0));
    A scores[4][4];
    product<T>(
        scores, slice_a, slice_b, query, [&](int i) { return i < here ? k + (key0 + i) * p.k.row : nullptr; }, columns,
        aligned);
    int visible[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      visible[i] = visible_keys(queries.position[thread_row() + i], block_position + key0, here);
      A tile_largest = minus_infinity<A>();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = thread_column() + j < visible[i] ? scores[i][j] * scale : minus_infinity<A>();
        tile_largest = maximum(tile_largest, scores[i][j]);
      }
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        tile_largest = maximum(tile_largest, __shfl_xor_sync(0xffffffffu, tile_largest, offset));
      }
      const A base = finite_base(maximum(largest[i], tile_largest));
      const A shrink = exponential(largest[i] - base);
      largest[i] = maximum(largest[i], tile_largest);
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = thread_column() + j < visible[i] ? exponential(scores[i][j] - base) : A(0);
        sum[i] += scores[i][j];
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[g][i][j] *= shrink;
      }
    }
    store_transposed(weights, scores);
    weighted_sum<T>(
        out, weights, slice_a, slice_b, [&](int i) { return i < here ? v + (key0 + i) * p.v.row : nullptr; }, here, 0,
        columns, aligned, visible_keys(first_position, block_position + key0, here) < here,
        [&](int key, int i) { return key < visible[i]; });
  }

  A* partial_out = static_cast<A*>(p.partial_out) + local * shape.entries() * columns;
  A* partial_lse = static_cast<A*>(p.partial_lse) + local * shape.entries();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
    if (thread_row() + i >= count) continue;
    const int64_t entry = queries.entry[thread_row() + i];
    const bool empty = sum[i] == A(0);
    if (thread_column() == 0) partial_lse[entry] = empty ? minus_infinity<A>() : largest[i] + logarithm(sum[i]);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = g * kTile + thread_column() + j;
        if (column < columns) partial_out[entry * columns + column] = empty ? A(0) : out[g][i][j] / sum[i];
      }
    }
  }
}

template <class T, int kGroups>
cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  const int64_t grid = p.units.count * max_tiles(p.shape);
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  constexpr int kBytes = tile_memory<acc_t<T>>();
  const cudaError_t status = allow_memory(attend_kernel<T, kGroups>, kBytes);
  if (status != cudaSuccess) return status;
  const int64_t head_dim = p.shape.head_dim, size = sizeof(T);
  const bool aligned =
      is_aligned(p.q, head_dim, size) && is_aligned(p.k, head_dim, size) && is_aligned(p.v, head_dim, size);
  attend_kernel<T, kGroups><<<static_cast<unsigned>(grid), kThreads, kBytes, stream>>>(p, aligned);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_attend(const AttendParams& p, Dtype dtype, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.shape.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
    if (p.shape.head_dim <= 64) return launch<T, 1>(p, stream);
    if (p.shape.head_dim <= 128) return launch<T, 2>(p, stream);
    return launch<T, 4>(p, stream);
  });
}

}  // namespace moba::cuda
