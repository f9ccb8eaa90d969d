// Where rows, keys and blocks of a unit lie.
#pragma once

#include "cuda/portable/numeric.cuh"

namespace moba::cuda {

template <class T>
__device__ __forceinline__ const T* unit_base(const Source& source, int64_t unit, int64_t heads) {
  return static_cast<const T*>(source.data) + unit / heads * source.group + unit % heads * source.head;
}
template <class T>
__device__ __forceinline__ T* unit_base(const Target& target, int64_t unit, int64_t heads) {
  return static_cast<T*>(target.data) + unit / heads * target.group + unit % heads * target.head;
}

// Tiles and blocks of `size` tokens never cross a sequence. Numbering those of the sequence that begins at token
// `begin` from begin / size + index leaves room for all of them without a prefix sum:
// (begin + length) / size + 1 - begin / size >= ceil(length / size).
__device__ __forceinline__ int64_t first_part(int64_t begin, int64_t index, int64_t size) {
  return begin / size + index;
}

struct Sequence {
  int64_t index;
  int64_t row_begin, rows;
  int64_t key_begin, keys;

  // Queries stand at the end of the keys.
  __device__ int64_t position(int64_t row) const { return keys - rows + row - row_begin; }
};

// cu_seqlens are not read on the host while a graph is captured, so they are clamped: wrong values must not lead
// outside the tensors.
__device__ __forceinline__ int64_t boundary(const int32_t* cu_seqlens, int64_t index, int64_t tokens) {
  const int64_t value = cu_seqlens[index];
  return value < 0 ? 0 : value > tokens ? tokens : value;
}

__device__ __forceinline__ Sequence sequence_at(const Shape& shape, int64_t index) {
  if (shape.cu_seqlens_q == nullptr) return {0, 0, shape.rows, 0, shape.keys};
  const int64_t row_begin = boundary(shape.cu_seqlens_q, index, shape.rows);
  const int64_t key_begin = boundary(shape.cu_seqlens_k, index, shape.keys);
  const int64_t row_end = boundary(shape.cu_seqlens_q, index + 1, shape.rows);
  const int64_t key_end = boundary(shape.cu_seqlens_k, index + 1, shape.keys);
  return {index, row_begin, max(row_end - row_begin, int64_t(0)), key_begin, max(key_end - key_begin, int64_t(0))};
}

// The last sequence whose parts (tiles or blocks of `size` tokens) begin at or before `part`.
__device__ __forceinline__ Sequence sequence_of_part(const Shape& shape, const int32_t* cu_seqlens, int64_t tokens,
                                                     int64_t part, int64_t size) {
  int64_t low = 0, high = shape.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_part(boundary(cu_seqlens, middle, tokens), middle, size) <= part) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return sequence_at(shape, low);
}

// The last sequence that begins at or before `row`; it holds the row, as those after an empty one begin at the same
// row.
__device__ __forceinline__ Sequence sequence_of_row(const Shape& shape, int64_t row) {
  int64_t low = 0, high = shape.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (boundary(shape.cu_seqlens_q, middle, shape.rows) <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return sequence_at(shape, low);
}

// A key block of a unit: its keys within the unit.
struct Block {
  Sequence sequence;
  int64_t key_begin, keys;  // keys <= 0: a number that the sequence does not use
};

__device__ __forceinline__ Block block_at(const Shape& shape, int64_t block) {
  const Sequence sequence = sequence_of_part(shape, shape.cu_seqlens_k, shape.keys, block, shape.block_size);
  const int64_t offset = (block - first_part(sequence.key_begin, sequence.index, shape.block_size)) * shape.block_size;
  if (offset < 0) return {sequence, 0, 0};
  return {sequence, sequence.key_begin + offset, min(shape.block_size, sequence.keys - offset)};
}

}  // namespace moba::cuda
