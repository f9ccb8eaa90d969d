// Stage 2 of routing: gate scores of 64 queries against 64 block means at a time, streamed into a heap of the best
// blocks per query. Scores are never stored for more than one tile.
#include "cuda/launch.h"
#include "cuda/portable/tile.cuh"
#include "cuda/portable/unit.cuh"

namespace moba::cuda {
namespace {

// Orders candidates by (score, block): the later block wins a tie, NaN is below every number. Zeros are equal.
__device__ __forceinline__ uint32_t ordered(float score) {
  if (isnan(score)) return 0;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered(double score) {
  if (isnan(score)) return 0;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(score + 0.0));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

template <class A>
struct GateKey {
  uint64_t value = 0;

  GateKey() = default;
  __device__ GateKey(float score, int block) : value(uint64_t(ordered(score)) << 32 | uint32_t(block)) {}
  __device__ bool operator<(const GateKey& other) const { return value < other.value; }
  __device__ int block() const { return static_cast<int>(value & 0xffffffffu); }
};
template <>
struct GateKey<double> {
  uint64_t score = 0;
  int64_t index = 0;

  GateKey() = default;
  __device__ GateKey(double score, int block) : score(ordered(score)), index(block) {}
  __device__ bool operator<(const GateKey& other) const {
    return score < other.score || (score == other.score && index < other.index);
  }
  __device__ int block() const { return static_cast<int>(index); }
};
static_assert(sizeof(GateKey<float>) <= kGateKeyBytes && sizeof(GateKey<double>) <= kGateKeyBytes);
static_assert(kGateRows == kTile);

// A binary heap with the worst candidate on top. Item i of neighbouring rows lie side by side.
template <class Key>
struct Heap {
  Key* items;
  int64_t size, capacity;

  __device__ Key& at(int64_t i) const { return items[i * kGateRows]; }

  // Puts `key` at the top of the first `count` items and moves it down to its place.
  __device__ void sink(Key key, int64_t count) const {
    int64_t i = 0;
    for (;;) {
      int64_t child = 2 * i + 1;
      if (child >= count) break;
      if (child + 1 < count && at(child + 1) < at(child)) ++child;
      if (!(at(child) < key)) break;
      at(i) = at(child);
      i = child;
    }
    at(i) = key;
  }

  __device__ void offer(Key key) {
    if (size == capacity) {
      if (at(0) < key) sink(key, size);
      return;
    }
    int64_t i = size++;
    while (i > 0 && key < at((i - 1) / 2)) {
      at(i) = at((i - 1) / 2);
      i = (i - 1) / 2;
    }
    at(i) = key;
  }

  // Best first.
  __device__ void sort() const {
    for (int64_t last = size - 1; last > 0; --last) {
      const Key worst = at(0);
      sink(at(last), last);
      at(last) = worst;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gate_topk_kernel(GateParams p, bool aligned) {
  using A = acc_t<T>;
  using Key = GateKey<A>;
  const Shape& shape = p.shape;
  const int64_t tile = blockIdx.x % p.tiles();
  const int64_t unit = p.units.begin + blockIdx.x / p.tiles();
  const Sequence sequence = sequence_of_part(shape, shape.cu_seqlens_q, shape.rows, tile, kTile);
  const int64_t offset = (tile - first_part(sequence.row_begin, sequence.index, kTile)) * kTile;
  if (offset < 0 || offset >= sequence.rows) return;
  const int rows = static_cast<int>(min(int64_t(kTile), sequence.rows - offset));
  const int64_t row_begin = sequence.row_begin + offset;

  extern __shared__ __align__(16) unsigned char memory[];
  A* slice_a = reinterpret_cast<A*>(memory);
  A* slice_b = slice_a + kSlice * kPitch;
  A* scores = slice_b + kSlice * kPitch;  // [kTile][kTile + 1], so that threads read rows without conflicts
  Key* candidates = reinterpret_cast<Key*>(memory + tile_memory<A>());
  const int64_t capacity = shape.slots - 1;
  if (p.candidates != nullptr) {
    candidates = static_cast<Key*>(p.candidates) + static_cast<int64_t>(blockIdx.x) * capacity * kGateRows;
  }

  const T* q = unit_base<T>(p.q, unit, shape.heads) + row_begin * p.q.row;
  const int64_t unit_k = unit / shape.heads_per_key_head();
  const int64_t first_block = first_part(sequence.key_begin, sequence.index, shape.block_size);
  const T* means = static_cast<const T*>(p.means) + (unit_k * shape.blocks() + first_block) * shape.head_dim;

  const bool selects = threadIdx.x < rows;
  Heap<Key> heap{candidates + threadIdx.x, 0, capacity};
  const int64_t position = sequence.position(row_begin + threadIdx.x);
  const int64_t current = position < 0 ? -1 : position / shape.block_size;
  const int64_t last_position = sequence.position(row_begin + rows - 1);
  const int64_t blocks = capacity == 0 || last_position < 0 ? 0 : last_position / shape.block_size;

  for (int64_t block0 = 0; block0 < blocks; block0 += kTile) {
    const int count = static_cast<int>(min(int64_t(kTile), blocks - block0));
    A sums[4][4];
    product<T>(
        sums, slice_a, slice_b, [&](int i) { return i < rows ? q + i * p.q.row : nullptr; },
        [&](int i) { return i < count ? means + (block0 + i) * shape.head_dim : nullptr; },
        static_cast<int>(shape.head_dim), aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[(thread_row() + i) * (kTile + 1) + thread_column() + j] = sums[i][j];
    }
    __syncthreads();
    if (selects) {
      for (int c = 0; c < count && block0 + c < current; ++c) {
        heap.offer(Key(scores[threadIdx.x * (kTile + 1) + c], static_cast<int>(block0 + c)));
      }
    }
    __syncthreads();
  }

  if (!selects) return;
  heap.sort();
  int32_t* route = unit_base<int32_t>(p.route, unit, shape.heads) + (row_begin + threadIdx.x) * p.route.row;
  route[0] = static_cast<int32_t>(current);
  for (int64_t i = 0; i < capacity; ++i) route[1 + i] = i < heap.size ? heap.at(i).block() : -1;
}

}  // namespace

cudaError_t launch_gate_topk(const GateParams& p, Dtype dtype, cudaStream_t stream) {
  const int64_t grid = p.units.count * p.tiles();
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const int64_t candidates = p.candidates == nullptr ? p.shape.slots - 1 : 0;
    if (candidates > kGateSharedCandidates) return cudaErrorInvalidValue;
    const int bytes = tile_memory<A>() + static_cast<int>(candidates * kGateRows * sizeof(GateKey<A>));
    const cudaError_t status = allow_memory(gate_topk_kernel<T>, bytes);
    if (status != cudaSuccess) return status;
    // Rows of means have head_dim elements, so they are aligned whenever q can be.
    const bool aligned = is_aligned(p.q, p.shape.head_dim, sizeof(T)) && reinterpret_cast<uintptr_t>(p.means) % 16 == 0;
    gate_topk_kernel<T><<<static_cast<unsigned>(grid), kThreads, bytes, stream>>>(p, aligned);
    return cudaGetLastError();
  });
}

}  // namespace moba::cuda
