// Products of 64 x 64 tiles: 256 threads, 4 x 4 results each, operands in shared memory as slices of 32 along the
// summed dimension.
#pragma once

#include "cuda/portable/numeric.cuh"

namespace moba::cuda {

constexpr int kTile = 64;
constexpr int kSlice = 32;
constexpr int kPitch = kTile + 4;  // keeps 16-byte alignment and spreads the banks
constexpr int kThreads = 256;

// Thread (x, y) of the 16 x 16 owns rows 4y..4y+3 and columns 4x..4x+3. The 16 threads of one y are half a warp.
__device__ __forceinline__ int thread_column() { return threadIdx.x % 16 * 4; }
__device__ __forceinline__ int thread_row() { return threadIdx.x / 16 * 4; }

template <class A>
struct alignas(16) Vector {
  A data[16 / sizeof(A)];
};

template <class A>
__device__ __forceinline__ void load4(A (&out)[4], const A* from) {
  constexpr int kEach = 16 / sizeof(A);
#pragma unroll
  for (int i = 0; i < 4; i += kEach) {
    const Vector<A> part = *reinterpret_cast<const Vector<A>*>(from + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[i + j] = part.data[j];
  }
}

template <class A>
__device__ __forceinline__ void store4(A* to, A a, A b, A c, A d) {
  const A values[4] = {a, b, c, d};
  constexpr int kEach = 16 / sizeof(A);
#pragma unroll
  for (int i = 0; i < 4; i += kEach) {
    Vector<A> part;
#pragma unroll
    for (int j = 0; j < kEach; ++j) part.data[j] = values[i + j];
    *reinterpret_cast<Vector<A>*>(to + i) = part;
  }
}

// Eight elements of a row, zeros beyond `count`. `aligned`: every row starts at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load8(acc_t<T> (&out)[8], const T* from, int count, bool aligned) {
  if (aligned && count >= 8) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += kEach) {
      const Vector<T> part = *reinterpret_cast<const Vector<T>*>(from + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) out[i + j] = to_acc(part.data[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < count ? to_acc(from[i]) : acc_t<T>(0);
  }
}

// A matrix whose rows are found by a function: row(i) is null where there is none, and reads as zeros.
// slice[d][i] = row(i)[d0 + d]: the slice of 64 rows for a product that sums over columns.
template <class T, class Row>
__device__ __forceinline__ void load_across(acc_t<T>* slice, Row row, int d0, int columns, bool aligned) {
  const int i = threadIdx.x % kTile;
  const int d = threadIdx.x / kTile * 8;
  const T* from = row(i);
  acc_t<T> values[8];
  load8<T>(values, from + d0 + d, from == nullptr ? 0 : columns - d0 - d, aligned);
#pragma unroll
  for (int e = 0; e < 8; ++e) slice[(d + e) * kPitch + i] = values[e];
}

// slice[i][c] = row(i)[c0 + c]: the slice of 32 rows for a product that sums over rows.
template <class T, class Row>
__device__ __forceinline__ void load_along(acc_t<T>* slice, Row row, int c0, int columns, bool aligned) {
  const int i = threadIdx.x / 8;
  const int c = threadIdx.x % 8 * 8;
  const T* from = row(i);
  acc_t<T> values[8];
  load8<T>(values, from + c0 + c, from == nullptr ? 0 : columns - c0 - c, aligned);
  acc_t<T>* to = slice + i * kPitch + c;
  store4(to, values[0], values[1], values[2], values[3]);
  store4(to + 4, values[4], values[5], values[6], values[7]);
}

// sums[i][j] += a[s][row + i] * b[s][column + j] over the slice, where counts(s, i) says that the term exists.
// A term that is masked is never multiplied in: 0 * NaN would leak.
template <class A, class Counts>
__device__ __forceinline__ void multiply(A (&sums)[4][4], const A* a, const A* b, Counts counts) {
  a += thread_row();
  b += thread_column();
#pragma unroll 8
  for (int s = 0; s < kSlice; ++s) {
    A x[4], y[4];
    load4(x, a + s * kPitch);
    load4(y, b + s * kPitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!counts(s, i)) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * y[j];
    }
  }
}

struct Always {
  __device__ __forceinline__ bool operator()(int, int) const { return true; }
};

// sums = rows of a times rows of b, transposed. Both slices may be overwritten afterwards.
template <class T, class RowA, class RowB>
__device__ __forceinline__ void product(acc_t<T> (&sums)[4][4], acc_t<T>* slice_a, acc_t<T>* slice_b, RowA row_a,
                                        RowB row_b, int columns, bool aligned) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0;
  }
  for (int d0 = 0; d0 < columns; d0 += kSlice) {
    load_across<T>(slice_a, row_a, d0, columns, aligned);
    load_across<T>(slice_b, row_b, d0, columns, aligned);
    __syncthreads();
    multiply(sums, slice_a, slice_b, Always{});
    __syncthreads();
  }
}

// sums[g] += weights, transposed, times the columns column + 64 g of 64 rows, of which `rows` exist. Weights are
// [64][kPitch], as store_transposed writes them; counts is as in multiply, over all 64 rows. The 64 rows are summed on
// their own first: over a long list the rounding errors of one running sum would grow with its length.
template <class T, int kGroups, class Row, class Counts>
__device__ __forceinline__ void weighted_sum(acc_t<T> (&sums)[kGroups][4][4], const acc_t<T>* weights,
                                             acc_t<T>* slice_a, acc_t<T>* slice_b, Row row, int rows, int column,
                                             int columns, bool aligned, bool masked, Counts counts) {
  // Sixteen more float64 sums beside those of four groups would not fit the registers.
  constexpr bool kOnTheirOwn = sizeof(acc_t<T>) * kGroups < 32;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int c0 = column + g * kTile;
    if (c0 < columns) {
      load_along<T>(slice_a, [&](int i) { return row(i); }, c0, columns, aligned);
      load_along<T>(slice_b, [&](int i) { return row(i + kSlice); }, c0, columns, aligned);
      __syncthreads();
      acc_t<T> fresh[4][4] = {};
      acc_t<T>(&part)[4][4] = kOnTheirOwn ? fresh : sums[g];
      for (int half = 0; half * kSlice < rows; ++half) {
        const acc_t<T>* a = weights + half * kSlice * kPitch;
        const acc_t<T>* b = half == 0 ? slice_a : slice_b;
        if (masked) {
          multiply(part, a, b, [&](int s, int i) { return counts(half * kSlice + s, i); });
        } else {
          multiply(part, a, b, Always{});
        }
      }
      if constexpr (kOnTheirOwn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[g][i][j] += fresh[i][j];
        }
      }
      __syncthreads();
    }
  }
}

// weights[column + j][row + i] = values[i][j]
template <class A>
__device__ __forceinline__ void store_transposed(A* weights, const A (&values)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    store4(weights + (thread_column() + j) * kPitch + thread_row(), values[0][j], values[1][j], values[2][j],
           values[3][j]);
  }
}

// Two slices and the weights.
template <class A>
constexpr int tile_memory() {
  return (2 * kSlice + kTile) * kPitch * static_cast<int>(sizeof(A));
}

// More than 48 KiB of shared memory have to be asked for, on every device that is used. Always for all that the device
// has: threads that launch one kernel with different sizes would otherwise take back what another was just given.
template <class Kernel>
cudaError_t allow_memory(Kernel* kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  int device = 0, limit = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              limit - static_cast<int>(attributes.sharedSizeBytes));
}

// Whether load8 may read 16 bytes at once.
inline bool is_aligned(const Source& source, int64_t head_dim, int64_t element_size) {
  const int64_t each = 16 / element_size;
  return reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && head_dim % 8 == 0 && source.group % each == 0 &&
         source.head % each == 0 && source.row % each == 0;
}

}  // namespace moba::cuda
