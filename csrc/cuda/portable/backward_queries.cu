// dq: a tile of 64 gathered queries against the keys of the block they chose, one partial dq per list entry, then a sum
// over the entries of each row in slot order.
#include "cuda/launch.h"
#include "cuda/portable/list_tile.cuh"

namespace moba::cuda {
namespace {

// Computes 64 * kGroups columns of dq; wider heads take several thread blocks, which all compute the scores.
template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads) backward_queries_kernel(BackwardQueriesParams p, int parts, bool aligned) {
  using A = acc_t<T>;
  const Shape& shape = p.shape;
  const int64_t tiles = max_tiles(shape), blocks = shape.blocks();
  const int column0 = static_cast<int>(blockIdx.x % parts) * kGroups * kTile;
  const int64_t index = blockIdx.x / parts;
  const int64_t local = index / tiles, tile = index % tiles;
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
  __shared__ A row_lse[kTile], row_delta[kTile];
  __shared__ int64_t sight[kTile];  // the last position that a row sees
  gather(queries, p.lists.entries + list * shape.entries() + first, count, shape.slots, block.sequence);
  __syncthreads();
  bool blind = false;  // a row whose scores are all minus infinity
  if (threadIdx.x < count) {
    const int64_t row = queries.row[threadIdx.x];
    row_lse[threadIdx.x] = unit_base<A>(p.lse, unit, shape.heads)[row * p.lse.row];
    row_delta[threadIdx.x] = static_cast<const A*>(p.delta)[list * shape.rows + row];
    blind = row_lse[threadIdx.x] == minus_infinity<A>();
  }
  if (threadIdx.x < kTile) sight[threadIdx.x] = blind ? -1 : queries.position[threadIdx.x];
  const bool any_blind = __syncthreads_or(blind);

  const int columns = static_cast<int>(shape.head_dim);
  const A scale = static_cast<A>(p.softmax_scale);
  const int64_t unit_k = unit / shape.heads_per_key_head();
  const T* q = unit_base<T>(p.q, unit, shape.heads);
  const T* dout = unit_base<T>(p.dout, unit, shape.heads);
  const T* k = unit_base<T>(p.k, unit_k, shape.heads_k) + block.key_begin * p.k.row;
  const T* v = unit_base<T>(p.v, unit_k, shape.heads_k) + block.key_begin * p.v.row;
  const auto query = [&](int i) { return i < count ? q + queries.row[i] * p.q.row : nullptr; };
  const auto gradient = [&](int i) { return i < count ? dout + queries.row[i] * p.dout.row : nullptr; };
  const int64_t block_position = block.key_begin - block.sequence.key_begin;
  const int64_t first_position = queries.position[0];
  const int64_t keys = min(block.keys, queries.position[count - 1] + 1 - block_position);

  A dq[kGroups][4][4] = {};
  for (int64_t key0 = 0; key0 < keys; key0 += kTile) {
    const int here = static_cast<int>(min(int64_t(kTile), keys - key0));
    const auto key_row = [&](int i) { return i < here ? k + (key0 + i) * p.k.row : nullptr; };
    const auto value_row = [&](int i) { return i < here ? v + (key0 + i) * p.v.row : nullptr; };
    A scores[4][4], change[4][4];
    product<T>(scores, slice_a, slice_b, query, key_row, columns, aligned);
    product<T>(change, slice_a, slice_b, gradient, value_row, columns, aligned);
    int visible[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = thread_row() + i;
      visible[i] = visible_keys(sight[row], block_position + key0, here);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool counts = thread_column() + j < visible[i];
        const A weight = counts ? exponential(scores[i][j] * scale - row_lse[row]) : A(0);
        change[i][j] = counts ? weight * (change[i][j] - row_delta[row]) : A(0);
      }
    }
    store_transposed(weights, change);
    weighted_sum<T>(dq, weights, slice_a, slice_b, key_row, here, column0, columns, aligned,
                    any_blind || visible_keys(first_position, block_position + key0, here) < here,
                    [&](int key, int i) { return key < visible[i]; });
  }

  A* partial_dq = static_cast<A*>(p.partial_dq) + local * shape.entries() * columns;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (thread_row() + i >= count) continue;
    A* to = partial_dq + queries.entry[thread_row() + i] * columns;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = column0 + g * kTile + thread_column() + j;
        if (column < columns) to[column] = dq[g][i][j];
      }
    }
  }
}

constexpr int kWarps = 8;
constexpr int kColumnsPerLane = kMaxHeadDim / 32;

template <class T>
__global__ void __launch_bounds__(32 * kWarps) sum_queries_kernel(BackwardQueriesParams p) {
  using A = acc_t<T>;
  const Shape& shape = p.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t local = index / shape.rows, row = index % shape.rows;
  if (local >= p.units.count) return;
  const int lane = threadIdx.x % 32;
  const int64_t unit = p.units.begin + local;
  const int32_t* choices = p.lists.choices + ((unit - p.lists.units.begin) * shape.rows + row) * shape.slots;
  const A* partial_dq = static_cast<const A*>(p.partial_dq) + index * shape.slots * shape.head_dim;
  A sum[kColumnsPerLane] = {};
  for (int64_t slot = 0; slot < shape.slots; ++slot) {
    if (choices[slot] < 0) continue;  // nothing was written there
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      const int column = lane + 32 * i;
      if (column < shape.head_dim) sum[i] += partial_dq[slot * shape.head_dim + column];
    }
  }
  T* dq = unit_base<T>(p.dq, unit, shape.heads) + row * p.dq.row;
#pragma unroll
  for (int i = 0; i < kColumnsPerLane; ++i) {
    const int column = lane + 32 * i;
    if (column < shape.head_dim) dq[column] = from_acc<T>(static_cast<A>(p.softmax_scale) * sum[i]);
  }
}

template <class T, int kGroups>
cudaError_t launch(const BackwardQueriesParams& p, cudaStream_t stream) {
  const int parts = static_cast<int>((p.shape.head_dim + kGroups * kTile - 1) / (kGroups * kTile));
  const int64_t grid = p.units.count * max_tiles(p.shape) * parts;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  constexpr int kBytes = tile_memory<acc_t<T>>();
  const cudaError_t status = allow_memory(backward_queries_kernel<T, kGroups>, kBytes);
  if (status != cudaSuccess) return status;
  bool aligned = true;
  for (const Source* source : {&p.q, &p.k, &p.v, &p.dout}) aligned &= is_aligned(*source, p.shape.head_dim, sizeof(T));
  backward_queries_kernel<T, kGroups><<<static_cast<unsigned>(grid), kThreads, kBytes, stream>>>(p, parts, aligned);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_backward_queries(const BackwardQueriesParams& p, Dtype dtype, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.shape.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
    if (p.shape.head_dim <= 64) return launch<T, 1>(p, stream);
    if (p.shape.head_dim <= 128) return launch<T, 2>(p, stream);
    // 128 more columns of dq in float64 would not fit the registers.
    return launch < T, sizeof(T) == 8 ? 2 : 4 > (p, stream);
  });
}

cudaError_t launch_sum_queries(const BackwardQueriesParams& p, Dtype dtype, cudaStream_t stream) {
  const int64_t grid = (p.units.count * p.shape.rows + kWarps - 1) / kWarps;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    sum_queries_kernel<T><<<static_cast<unsigned>(grid), 32 * kWarps, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace moba::cuda
