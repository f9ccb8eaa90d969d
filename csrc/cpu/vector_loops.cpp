// Each loop is compiled for AVX-512, AVX2 and the baseline; the loader picks one.
#include "vector_loops.h"

#include <algorithm>
#include <limits>

namespace moba::cpu {

MOBA_VECTORISED void scale_and_add(float* to, float scale, const float* from, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] * scale + from[i] * factor;
}

void scale_and_add(double* to, double scale, const double* from, double factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] * scale + from[i] * factor;
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

}  // namespace moba::cpu
