// The loops between the matrix products. Each is compiled for AVX-512, AVX2 and the baseline; the loader picks one.
#include <algorithm>
#include <bit>
#include <limits>

#include "linear_algebra.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOBA_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOBA_VECTORISED
#endif

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

}  // namespace

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

namespace {

// The k-th largest of the maxima of kLanes disjoint parts: k different values reach it.
template <typename A>
[[gnu::always_inline]] inline A kth_lane_maximum(const A* values, int64_t count, int64_t k) {
  constexpr int64_t kLanes = 16;
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  if (k > kLanes || count <= kLanes) return -kInfinity;
  A best[kLanes];
  std::fill_n(best, kLanes, -kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) best[j] = values[i + j] > best[j] ? values[i + j] : best[j];
  }
  for (int64_t j = 0; i + j < count; ++j) best[j] = values[i + j] > best[j] ? values[i + j] : best[j];
  // Rank by counting, without branches: the k-th largest is the smallest of those with fewer than k larger ones.
  int32_t larger[kLanes] = {};
  for (int64_t other = 0; other < kLanes; ++other) {
    for (int64_t j = 0; j < kLanes; ++j) larger[j] += best[other] > best[j];
  }
  A kth = kInfinity;
  for (int64_t j = 0; j < kLanes; ++j) {
    const A candidate = larger[j] < k ? best[j] : kInfinity;
    kth = candidate < kth ? candidate : kth;
  }
  return kth;
}

template <typename A>
[[gnu::always_inline]] inline int64_t collect_reaching(const A* values, int64_t count, A bound, int32_t* indices) {
  constexpr int64_t kGroup = 32;
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    const int64_t end = std::min(count, begin + kGroup);
    int32_t any = 0;
    for (int64_t i = begin; i < end; ++i) any |= !(values[i] < bound);
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      indices[found] = static_cast<int32_t>(i);
      found += !(values[i] < bound);
    }
  }
  return found;
}

}  // namespace

MOBA_VECTORISED float kth_bound(const float* values, int64_t count, int64_t k) {
  return kth_lane_maximum(values, count, k);
}

double kth_bound(const double* values, int64_t count, int64_t k) { return kth_lane_maximum(values, count, k); }

MOBA_VECTORISED int64_t find_reaching(const float* values, int64_t count, float bound, int32_t* indices) {
  return collect_reaching(values, count, bound, indices);
}

int64_t find_reaching(const double* values, int64_t count, double bound, int32_t* indices) {
  return collect_reaching(values, count, bound, indices);
}

MOBA_VECTORISED void softmax_gradient(const float* p, float* dp, int64_t count, float shift, float scale) {
  for (int64_t i = 0; i < count; ++i) dp[i] = p[i] * (dp[i] - shift) * scale;
}

void softmax_gradient(const double* p, double* dp, int64_t count, double shift, double scale) {
  for (int64_t i = 0; i < count; ++i) dp[i] = p[i] * (dp[i] - shift) * scale;
}

}  // namespace moba::cpu
