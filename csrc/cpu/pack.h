// Brings rows of tensors into the layouts that products read.
#pragma once

#include <cstring>
#include <limits>

#include "parallel.h"
#include "problem.h"
#include "products.h"
#include "tasks.h"

namespace moba::cpu {

// Unit `index` of a row; a term beyond the row is 0.
template <typename U, typename T>
U unit_of(const T* row, int64_t index, int64_t head_dim) {
  if constexpr (std::is_same_v<U, Pair>) {
    return {row[2 * index], 2 * index + 1 < head_dim ? row[2 * index + 1] : T(0)};
  } else {
    return static_cast<U>(row[index]);
  }
}

// A row as the row of a left operand.
template <typename U, typename T>
void load_row(const T* from, U* to, int64_t head_dim) {
  if constexpr (std::is_same_v<U, T>) {
    std::memcpy(to, from, head_dim * sizeof(T));
  } else if constexpr (std::is_same_v<U, Pair>) {
    if (head_dim % 2 != 0) to[head_dim / 2] = unit_of<U>(from, head_dim / 2, head_dim);
    std::memcpy(static_cast<void*>(to), from, head_dim / 2 * sizeof(U));
  } else {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<U>(from[d]);
  }
}

// Two rows as one row of a right operand whose terms are rows; `second` may be missing.
template <typename T>
void load_row_pair(const T* first, const T* second, Pair* to, int64_t head_dim) {
  if (second == nullptr) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = {first[d], T(0)};
  } else {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = {first[d], second[d]};
  }
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  float sum = 0;  // 0 * x is NaN for NaN and infinities, 0 otherwise
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += 0.0f * static_cast<float>(values[i]);
  return sum == 0;
}

template <typename T>
bool all_finite(Rows<const T> rows, int64_t begin, int64_t end, int64_t head_dim) {
  for (int64_t row = begin; row < end; ++row) {
    if (!all_finite(rows[row], head_dim)) return false;
  }
  return true;
}

// Keys or values, with sums over head_dim: [head_dim, keys].
template <typename T, typename U>
class TransposedTile {
 public:
  explicit TransposedTile(int64_t head_dim) : head_dim_(head_dim), data_(units<U>(head_dim) * kStride) {}

  void load(Rows<const T> rows, int64_t begin, int64_t count) {
    for (int64_t first = 0; first < count; first += kLines) {
      const int64_t past = std::min(first + kLines, count);
      for (int64_t unit = 0; unit < units<U>(head_dim_); ++unit) {
        U* to = data_ + unit * kStride;
        for (int64_t i = first; i < past; ++i) to[i] = unit_of<U>(rows[begin + i], unit, head_dim_);
      }
    }
  }
  operator Right<U>() const { return {data_, kStride}; }

 private:
  // Not a power of two, so that the rows of a strip fall into different sets of the first-level cache.
  static constexpr int64_t kStride = kTileKeys + 16, kLines = 16;
  int64_t head_dim_;
  Scratch<U> data_;
};

// Keys or values, with sums over keys: [keys, head_dim]. In place where the tensor has that form.
template <typename T, typename U>
class RowTile {
 public:
  explicit RowTile(int64_t head_dim) : head_dim_(head_dim), copy_(units<U>(kTileKeys) * head_dim) {}

  void load(Rows<const T> rows, int64_t begin, int64_t count) {
    operand_ = {copy_, head_dim_};
    if constexpr (std::is_same_v<U, Pair>) {
      for (int64_t i = 0; i < count; i += 2) {
        load_row_pair(rows[begin + i], i + 1 < count ? rows[begin + i + 1] : nullptr, copy_ + i / 2 * head_dim_,
                      head_dim_);
      }
      return;
    } else if constexpr (std::is_same_v<U, T>) {
      // BLAS takes no overlapping rows (an expanded tensor) and 32-bit strides only.
      if (rows.stride >= head_dim_ && rows.stride <= std::numeric_limits<int>::max()) {
        operand_ = {rows[begin], rows.stride};
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) load_row(rows[begin + i], copy_ + i * head_dim_, head_dim_);
  }
  operator Right<U>() const { return operand_; }

 private:
  int64_t head_dim_;
  Scratch<U> copy_;
  Right<U> operand_{};
};

// Starts to bring rows into the second-level cache. Queries that chose a block lie anywhere, so the hardware does not
// see them coming.
template <typename T>
void prefetch(Queries queries, HeadRows<T> rows, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (const Query* query = queries.begin; query < queries.end; ++query) {
    const T* row = rows(query->head, query->row);
    for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(row + d, 1, 2);
  }
}

// The rows of a panel: [queries, head_dim].
template <typename U, typename T>
Left<U> gather(const Panel& panel, HeadRows<const T> from, int64_t head_dim, U* to) {
  const int64_t stride = units<U>(head_dim);
  for (int64_t i = 0; i < panel.count; ++i) {
    load_row(from(panel.queries[i].head, panel.queries[i].row), to + i * stride, head_dim);
  }
  return {to, stride, 1};
}

// The same rows, already gathered as `left`, with sums over queries: [queries, head_dim].
template <typename T, typename U>
Right<U> gather_terms(const Panel& panel, HeadRows<const T> from, int64_t head_dim, Left<U> left, U* to) {
  if constexpr (std::is_same_v<U, Pair>) {
    const auto row = [&](int64_t i) { return from(panel.queries[i].head, panel.queries[i].row); };
    for (int64_t i = 0; i < panel.count; i += 2) {
      load_row_pair(row(i), i + 1 < panel.count ? row(i + 1) : nullptr, to + i / 2 * head_dim, head_dim);
    }
    return {to, head_dim};
  } else {
    return {left.data, left.row_stride};
  }
}

}  // namespace moba::cpu
