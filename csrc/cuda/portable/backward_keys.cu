// dk and dv: 64 keys of a block against all queries that chose it, in list order and head after head of the group, so
// that the sums need no atomics and always run in the same order.
#include "cuda/launch.h"
#include "cuda/portable/list_tile.cuh"

namespace moba::cuda {
namespace {

// Computes 64 * kGroups columns of dk and dv; wider heads take several thread blocks, which all compute the scores.
template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) backward_keys_kernel(BackwardKeysParams p, int parts, bool aligned) {
  using A = acc_t<T>;
  const Shape& shape = p.shape;
  const int64_t blocks = shape.blocks();
  const int64_t key_tiles = (min(shape.block_size, shape.keys) + kTile - 1) / kTile;
  int64_t index = blockIdx.x;
  const int column0 = static_cast<int>(index % parts) * kGroups * kTile;
  index /= parts;
  const int64_t key0 = index % key_tiles * kTile;
  index /= key_tiles;
  const int64_t number = index % blocks;
  const int64_t unit_k = p.units_k.begin + index / blocks;
  const Block block = block_at(shape, number);
  if (key0 >= block.keys) return;
  const int keys = static_cast<int>(min(int64_t(kTile), block.keys - key0));
  const int64_t key_position = block.key_begin - block.sequence.key_begin + key0;

  extern __shared__ __align__(16) unsigned char memory[];
  A* slice_a = reinterpret_cast<A*>(memory);
  A* slice_b = slice_a + kSlice * kPitch;
  A* weights = slice_b + kSlice * kPitch;
  __shared__ Gathered queries;
  __shared__ A row_lse[kTile], row_delta[kTile];
  __shared__ int64_t sight[kTile];  // the last position that a row sees

  const int columns = static_cast<int>(shape.head_dim);
  const A scale = static_cast<A>(p.softmax_scale);
  const T* k = unit_base<T>(p.k, unit_k, shape.heads_k) + (block.key_begin + key0) * p.k.row;
  const T* v = unit_base<T>(p.v, unit_k, shape.heads_k) + (block.key_begin + key0) * p.v.row;
  const auto key_row = [&](int i) { return i < keys ? k + i * p.k.row : nullptr; };
  const auto value_row = [&](int i) { return i < keys ? v + i * p.v.row : nullptr; };

  A dk[kGroups][4][4] = {};
  A dv[kGroups][4][4] = {};
  for (int64_t head = 0; head < shape.heads_per_key_head(); ++head) {
    const int64_t unit = unit_k * shape.heads_per_key_head() + head;
    const int64_t list = unit - p.lists.units.begin;
    const int64_t* list_begin = p.lists.list_begin + list * (blocks + 1) + number;
    const int64_t* entries = p.lists.entries + list * shape.entries();
    const T* q = unit_base<T>(p.q, unit, shape.heads);
    const T* dout = unit_base<T>(p.dout, unit, shape.heads);
    const A* lse = unit_base<A>(p.lse, unit, shape.heads);
    const A* delta = static_cast<const A*>(p.delta) + list * shape.rows;

    for (int64_t first = list_begin[0]; first < list_begin[1]; first += kTile) {
      const int count = static_cast<int>(min(int64_t(kTile), list_begin[1] - first));
      __syncthreads();
      gather(queries, entries + first, count, shape.slots, block.sequence);
      __syncthreads();
      if (queries.position[count - 1] < key_position) continue;
      bool blind = false;  // a row whose scores are all minus infinity
      if (threadIdx.x < count) {
        const int64_t row = queries.row[threadIdx.x];
        row_lse[threadIdx.x] = lse[row * p.lse.row];
        row_delta[threadIdx.x] = delta[row];
        blind = row_lse[threadIdx.x] == minus_infinity<A>();
      }
      if (threadIdx.x < kTile) sight[threadIdx.x] = blind ? -1 : queries.position[threadIdx.x];
      const bool any_blind = __syncthreads_or(blind);
      const auto query = [&](int i) { return i < count ? q + queries.row[i] * p.q.row : nullptr; };
      const auto gradient = [&](int i) { return i < count ? dout + queries.row[i] * p.dout.row : nullptr; };
      const bool masked = any_blind || visible_keys(queries.position[0], key_position, keys) < keys;
      const auto sees = [&](int i, int key) { return key_position + key <= sight[i]; };

      A weight[4][4], change[4][4];
      product<T>(weight, slice_a, slice_b, key_row, query, columns, aligned);
      product<T>(change, slice_a, slice_b, value_row, gradient, columns, aligned);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = thread_column() + j;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = thread_row() + i;
          const bool counts = key < keys && sees(row, key);
          weight[i][j] = counts ? exponential(weight[i][j] * scale - row_lse[row]) : A(0);
          change[i][j] = counts ? weight[i][j] * (change[i][j] - row_delta[row]) : A(0);
        }
      }
      const auto counts = [&](int row, int i) { return sees(row, thread_row() + i); };
      store_transposed(weights, weight);
      weighted_sum<T>(dv, weights, slice_a, slice_b, gradient, count, column0, columns, aligned, masked, counts);
      __syncthreads();
      store_transposed(weights, change);
      weighted_sum<T>(dk, weights, slice_a, slice_b, query, count, column0, columns, aligned, masked, counts);
    }
  }

  T* to_k = unit_base<T>(p.dk, unit_k, shape.heads_k) + (block.key_begin + key0) * p.dk.row;
  T* to_v = unit_base<T>(p.dv, unit_k, shape.heads_k) + (block.key_begin + key0) * p.dv.row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = thread_row() + i;
    if (key >= keys) continue;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = column0 + g * kTile + thread_column() + j;
        if (column < columns) {
          to_k[key * p.dk.row + column] = from_acc<T>(scale * dk[g][i][j]);
          to_v[key * p.dv.row + column] = from_acc<T>(dv[g][i][j]);
        }
      }
    }
  }
}

template <class T, int kGroups>
cudaError_t launch(const BackwardKeysParams& p, cudaStream_t stream) {
  const Shape& shape = p.shape;
  const int64_t reach = shape.block_size < shape.keys ? shape.block_size : shape.keys;
  const int64_t key_tiles = (reach + kTile - 1) / kTile;
  const int parts = static_cast<int>((shape.head_dim + kGroups * kTile - 1) / (kGroups * kTile));
  const int64_t grid = p.units_k.count * shape.blocks() * key_tiles * parts;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  constexpr int kBytes = tile_memory<acc_t<T>>();
  const cudaError_t status = allow_memory(backward_keys_kernel<T, kGroups>, kBytes);
  if (status != cudaSuccess) return status;
  bool aligned = true;
  for (const Source* source : {&p.q, &p.k, &p.v, &p.dout}) aligned &= is_aligned(*source, shape.head_dim, sizeof(T));
  backward_keys_kernel<T, kGroups><<<static_cast<unsigned>(grid), kThreads, kBytes, stream>>>(p, parts, aligned);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_backward_keys(const BackwardKeysParams& p, Dtype dtype, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // 64 more columns of dk and dv in float64 would not fit the registers.
    if constexpr (sizeof(T) < 8) {
      if (p.shape.head_dim > 64) return launch<T, 2>(p, stream);
    }
    return launch<T, 1>(p, stream);
  });
}

}  // namespace moba::cuda
