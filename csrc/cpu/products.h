// Products of packed matrices, and the softmax between them: the arithmetic of all stages.
//
// An operand is a matrix of units: numbers of the accumulation type, or pairs of bfloat16 numbers where the machine has
// instructions that multiply such pairs and add in float32. A pair holds two consecutive terms of the sums.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

namespace moba::cpu {

struct Pair {
  at::BFloat16 first, second;
};

template <typename U>
using Accumulated = std::conditional_t<std::is_same_v<U, double>, double, float>;

template <typename U>
constexpr int64_t kTerms = std::is_same_v<U, Pair> ? 2 : 1;

// How many units hold `terms` terms.
template <typename U>
constexpr int64_t units(int64_t terms) {
  return (terms + kTerms<U> - 1) / kTerms<U>;
}

// Unit (row, term) lies at data[row * row_stride + term * term_stride]; one of the strides is 1.
template <typename U>
struct Left {
  const U* data;
  int64_t row_stride, term_stride;
};

// Unit (term, column) lies at data[term * stride + column].
template <typename U>
struct Right {
  const U* data;
  int64_t stride;
};

// Row-major.
template <typename A>
struct Matrix {
  A* data;
  int64_t stride;
  A* operator[](int64_t row) const { return data + row * stride; }
};

enum class Into { kEmpty, kSum };

// c [m, n] = alpha a b, or c += alpha a b, with sums over `k` units.
void multiply(int64_t m, int64_t n, int64_t k, double alpha, Left<double> a, Right<double> b, Into into,
              Matrix<double> c);
void multiply(int64_t m, int64_t n, int64_t k, float alpha, Left<float> a, Right<float> b, Into into, Matrix<float> c);
void multiply(int64_t m, int64_t n, int64_t k, float alpha, Left<Pair> a, Right<Pair> b, Into into, Matrix<float> c);

// Scores of a panel: row i sees the first visible[i] of `keys` keys.
template <typename A>
struct Scores {
  Matrix<A> matrix;
  int64_t rows, keys;
  const int64_t* visible;
};

// Row i of p becomes exp(score - maximum[i]), 0 where masked. NaN is no maximum; it is -inf where there is no other.
// p is a left operand with rows of `stride` units; the scores themselves may be overwritten.
void to_probabilities(const Scores<double>& scores, double* maximum, double* sum, double* p, int64_t stride);
void to_probabilities(const Scores<float>& scores, float* maximum, float* sum, float* p, int64_t stride);
void to_probabilities(const Scores<float>& scores, float* maximum, float* sum, Pair* p, int64_t stride);

// What the backward products read, in units. p and ds are summed over query rows: units (row / kTerms, key). ds_rows is
// summed over keys: units (row, key / kTerms).
template <typename U>
struct GradientOperands {
  U *p, *ds, *ds_rows;
  int64_t stride, rows_stride;
};

// p = exp(score - lse[i]) and ds = p (dp - delta[i]) scale; both 0 where masked. For units of one number the operands
// are the scores and dp themselves.
void to_gradients(const Scores<double>& scores, Matrix<double> dp, const double* lse, const double* delta, double scale,
                  const GradientOperands<double>& to);
void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta, float scale,
                  const GradientOperands<float>& to);
void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta, float scale,
                  const GradientOperands<Pair>& to);

// Whether this machine multiplies pairs; functions on pairs must not be called where it does not.
bool multiplies_pairs();

// Calls f(T{}, U{}) with the element type of a tensor and the unit that its products use.
template <typename F>
void with_types(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble: return f(double{}, double{});
    case at::kFloat: return f(float{}, float{});
    case at::kHalf: return f(at::Half{}, float{});
    default: return multiplies_pairs() ? f(at::BFloat16{}, Pair{}) : f(at::BFloat16{}, float{});
  }
}

}  // namespace moba::cpu
