// Where the rows and blocks of a unit lie, in 32 bits: what portable/unit.cuh says, without its long divisions.
#pragma once

#include <cstdint>

#include "cuda/sm90/params.h"

namespace moba::cuda::sm90 {

// The blocks before the current one of a row, numbered within the unit.
struct PastBlocks {
  int first, count;
  bool exists;  // the row belongs to a sequence, and has a current block
};

struct Sequences {
  const Shape& shape;
  int rows, keys, block_size;

  __device__ __forceinline__ explicit Sequences(const Shape& shape)
      : shape(shape),
        rows(static_cast<int>(shape.rows)),
        keys(static_cast<int>(shape.keys)),
        block_size(static_cast<int>(shape.block_size)) {}

  __device__ __forceinline__ int row_begin(int sequence) const {
    return min(max(__ldg(shape.cu_seqlens_q + sequence), 0), rows);
  }
  __device__ __forceinline__ int key_begin(int sequence) const {
    return min(max(__ldg(shape.cu_seqlens_k + sequence), 0), keys);
  }

  // The last sequence for which begin(sequence) <= value.
  template <class Begin>
  __device__ __forceinline__ int last(int value, Begin begin) const {
    int low = 0, high = static_cast<int>(shape.sequences) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (begin(middle) <= value) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  __device__ __forceinline__ PastBlocks past_of(int row) const {
    if (shape.cu_seqlens_q == nullptr) {
      const int position = keys - rows + row;
      return {0, position < 0 ? 0 : position / block_size, position >= 0};
    }
    const int sequence = last(row, [&](int i) { return row_begin(i); });
    const int begin = key_begin(sequence), end = key_begin(sequence + 1), row_end = row_begin(sequence + 1);
    const int position = end - begin - row_end + row, first = begin / block_size + sequence;
    const bool exists = row < row_end && position >= 0 && end > begin;
    return {first, exists ? position / block_size : 0, exists};
  }

  // The first key of a block, of those that a row can choose.
  __device__ __forceinline__ int first_key(int block) const {
    if (shape.cu_seqlens_q == nullptr) return block * block_size;
    const int sequence = last(block, [&](int i) { return key_begin(i) / block_size + i; });
    const int begin = key_begin(sequence);
    return begin + (block - begin / block_size - sequence) * block_size;
  }
};

}  // namespace moba::cuda::sm90
