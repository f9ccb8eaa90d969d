// Row-major matrix products through the BLAS that libtorch itself is built on and exports, and the vector loops between
// them. All matrices are in the accumulation type: float, or double for float64 tensors.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstring>

extern "C" {
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc);
void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
            const int* ldc);
}

namespace moba::cpu {

// A row-major matrix and the distance between its rows.
template <typename A>
struct Matrix {
  A* data;
  int64_t stride;
};

enum class Transpose : char { kNo = 'N', kYes = 'T' };

// c [m, n] = alpha * op(a) * op(b) + beta * c, with op(a) [m, k] and op(b) [k, n].
template <typename A>
void multiply(Transpose op_a, Transpose op_b, int64_t m, int64_t n, int64_t k, A alpha, Matrix<const A> a,
              Matrix<const A> b, A beta, Matrix<A> c) {
  if (m == 0 || n == 0) return;
  // BLAS is column-major: c^T = op(b)^T op(a)^T. Leading dimensions of one-row matrices must still be large enough.
  const char first = static_cast<char>(op_b), second = static_cast<char>(op_a);
  const auto leading = [](int64_t stride, int64_t width) { return static_cast<int>(std::max(stride, width)); };
  const int rows = static_cast<int>(n), columns = static_cast<int>(m), inner = static_cast<int>(k);
  const int ldb = leading(b.stride, op_b == Transpose::kNo ? n : k);
  const int lda = leading(a.stride, op_a == Transpose::kNo ? k : m);
  const int ldc = leading(c.stride, n);
  if constexpr (std::is_same_v<A, double>) {
    dgemm_(&first, &second, &rows, &columns, &inner, &alpha, b.data, &ldb, a.data, &lda, &beta, c.data, &ldc);
  } else {
    sgemm_(&first, &second, &rows, &columns, &inner, &alpha, b.data, &ldb, a.data, &lda, &beta, c.data, &ldc);
  }
}

// Vector loops, compiled for several instruction sets in vector_loops.cpp; the machine's best one runs.
float exp_minus(float* values, int64_t count, float shift);  // values = exp(values - shift); returns their sum
double exp_minus(double* values, int64_t count, double shift);
float largest(const float* values, int64_t count);  // NaN is skipped; -inf if there is nothing else
double largest(const double* values, int64_t count);
// A number that at least k of the values reach, close to the k-th largest; -inf where it finds none. NaN is skipped.
float kth_bound(const float* values, int64_t count, int64_t k);
double kth_bound(const double* values, int64_t count, int64_t k);
// The indices of the values that are not below `bound` (NaN is not), ascending; returns their number.
int64_t find_reaching(const float* values, int64_t count, float bound, int32_t* indices);
int64_t find_reaching(const double* values, int64_t count, double bound, int32_t* indices);
// ds = p * (dp - shift) * scale, written over dp.
void softmax_gradient(const float* p, float* dp, int64_t count, float shift, float scale);
void softmax_gradient(const double* p, double* dp, int64_t count, double shift, double scale);

template <typename A>
bool all_finite(const A* values, int64_t count) {
  A sum = 0;  // 0 * x is NaN for NaN and infinities, 0 otherwise
  for (int64_t i = 0; i < count; ++i) sum += A(0) * values[i];
  return sum == 0;
}

// One row of a tensor as numbers of the accumulation type.
template <typename A, typename T>
void load_row(const T* from, A* to, int64_t count) {
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(to, from, count * sizeof(A));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i]);
  }
}

}  // namespace moba::cpu
