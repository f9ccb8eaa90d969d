// Softmax and its gradient on a panel of scores, for any machine.
#include <bit>
#include <cmath>
#include <limits>

#include "avx512.h"
#include "vector_loops.h"

namespace moba::cpu {
namespace {

// exp(x) for x <= 0 to about one unit in the last place; NaN stays NaN, anything below the normal range gives 0.
// 2^n * polynomial(r) with x = n ln2 + r, |r| <= ln2 / 2; the rounding to n adds 1.5 * 2^23, whose low mantissa bits
// are then n itself.
[[gnu::always_inline]] inline float exp_of_nonpositive(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  constexpr float kRound = 12582912.0f, kSmallest = -87.33654f;
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<int32_t>(shifted) + 127) << 23);
  return x < kSmallest ? 0.0f : p * power;
}

// values = exp(values - shift); returns their sum.
MOBA_VECTORISED float exp_minus(float* values, int64_t count, float shift) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    values[i] = exp_of_nonpositive(values[i] - shift);
    sum += values[i];
  }
  return sum;
}

double exp_minus(double* values, int64_t count, double shift) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - shift);
  return sum;
}

MOBA_VECTORISED float largest(const float* values, int64_t count) {
  float best = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) best = values[i] > best ? values[i] : best;
  return best;
}

double largest(const double* values, int64_t count) {
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) best = values[i] > best ? values[i] : best;
  return best;
}

MOBA_VECTORISED void softmax_gradient(const float* p, float* dp, int64_t count, float shift, float scale) {
  for (int64_t i = 0; i < count; ++i) dp[i] = p[i] * (dp[i] - shift) * scale;
}

void softmax_gradient(const double* p, double* dp, int64_t count, double shift, double scale) {
  for (int64_t i = 0; i < count; ++i) dp[i] = p[i] * (dp[i] - shift) * scale;
}

// In place: p is the matrix of scores.
template <typename A>
void probabilities_in_place(const Scores<A>& scores, A* maximum, A* sum) {
  for (int64_t i = 0; i < scores.rows; ++i) {
    A* row = scores.matrix[i];
    maximum[i] = largest(row, scores.visible[i]);
    // A row whose maximum is -inf has no finite score, and (-inf) - (-inf) would be NaN.
    const A shift = maximum[i] == -std::numeric_limits<A>::infinity() ? A(0) : maximum[i];
    sum[i] = exp_minus(row, scores.visible[i], shift);
    std::fill(row + scores.visible[i], row + scores.keys, A(0));
  }
}

template <typename A>
void gradients_in_place(const Scores<A>& scores, Matrix<A> dp, const A* lse, const A* delta, A scale) {
  for (int64_t i = 0; i < scores.rows; ++i) {
    const int64_t visible = scores.visible[i];
    exp_minus(scores.matrix[i], visible, lse[i]);
    softmax_gradient(scores.matrix[i], dp[i], visible, delta[i], scale);
    std::fill(scores.matrix[i] + visible, scores.matrix[i] + scores.keys, A(0));
    std::fill(dp[i] + visible, dp[i] + scores.keys, A(0));
  }
}

}  // namespace

void to_probabilities(const Scores<double>& scores, double* maximum, double* sum, double*, int64_t) {
  probabilities_in_place(scores, maximum, sum);
}

void to_probabilities(const Scores<float>& scores, float* maximum, float* sum, float* p, int64_t stride) {
  if (avx512::available()) return avx512::to_probabilities(scores, maximum, sum, p, stride);
  probabilities_in_place(scores, maximum, sum);
}

void to_probabilities(const Scores<float>& scores, float* maximum, float* sum, Pair* p, int64_t stride) {
  avx512::to_probabilities(scores, maximum, sum, p, stride);
}

void to_gradients(const Scores<double>& scores, Matrix<double> dp, const double* lse, const double* delta, double scale,
                  const GradientOperands<double>&) {
  gradients_in_place(scores, dp, lse, delta, scale);
}

void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta, float scale,
                  const GradientOperands<float>& to) {
  if (avx512::available()) return avx512::to_gradients(scores, dp, lse, delta, scale, to);
  gradients_in_place(scores, dp, lse, delta, scale);
}

void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta, float scale,
                  const GradientOperands<Pair>& to) {
  avx512::to_gradients(scores, dp, lse, delta, scale, to);
}

}  // namespace moba::cpu
