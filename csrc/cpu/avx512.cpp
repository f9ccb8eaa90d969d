// The products and the softmax of a panel, in vectors of 16.
#include "avx512.h"

#include <ATen/Version.h>

#include <limits>

namespace moba::cpu::avx512 {
namespace {

MOBA_AVX512 inline __m512 multiply_add(float a, __m512 b, __m512 sum, float) {
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
}
MOBA_AVX512 inline __m512 multiply_add(float a, __m512 b, __m512 sum, Pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}

// kRows x kVectors vectors of the result stay in registers over the whole sum. 6 x 4 of them need 10 loads for 24
// multiplications, so that the multiplier is what limits. Units of either kind are 4 bytes, moved as floats.
template <typename U, int kRows, int kVectors>
MOBA_AVX512 void multiply_tile(int64_t k, float alpha, const float* a, int64_t row_stride, int64_t term_stride,
                               const float* b, int64_t b_stride, Into into, float* c, int64_t c_stride,
                               __mmask16 last) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t term = 0; term < k; ++term, a += term_stride, b += b_stride) {
    __m512 right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors - 1; ++j) right[j] = _mm512_loadu_ps(b + j * kLanes);
    right[kVectors - 1] = _mm512_maskz_loadu_ps(last, b + (kVectors - 1) * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(a[i * row_stride], right[j], sum[i][j], U{});
    }
  }
  const __m512 factor = _mm512_set1_ps(alpha);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const __mmask16 lanes = j == kVectors - 1 ? last : __mmask16(0xffff);
      float* to = c + i * c_stride + j * kLanes;
      const __m512 before = into == Into::kSum ? _mm512_maskz_loadu_ps(lanes, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, lanes, _mm512_fmadd_ps(sum[i][j], factor, before));
    }
  }
}

template <typename U, int kVectors>
MOBA_AVX512 void multiply_strip(int64_t m, int64_t k, float alpha, const float* a, int64_t row_stride,
                                int64_t term_stride, const float* b, int64_t b_stride, Into into, float* c,
                                int64_t c_stride, __mmask16 last) {
#define MOBA_TILE(rows)                                                                                      \
  multiply_tile<U, rows, kVectors>(k, alpha, a + i * row_stride, row_stride, term_stride, b, b_stride, into, \
                                   c + i * c_stride, c_stride, last)
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) MOBA_TILE(6);
  switch (m - i) {
    case 5: MOBA_TILE(5); break;
    case 4: MOBA_TILE(4); break;
    case 3: MOBA_TILE(3); break;
    case 2: MOBA_TILE(2); break;
    case 1: MOBA_TILE(1); break;
  }
#undef MOBA_TILE
}

// exp(x) for x <= 0 to about two units in the last place: 2^n times a polynomial in r, x log2(e) = n + r, |r| <= 1/2.
// NaN stays NaN.
MOBA_AVX512 inline __m512 exp_of_nonpositive(__m512 x) {
  // Far below what float32 holds; an infinity would make r NaN. The order of operands lets NaN through.
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.32647241e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.67151286e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55073375e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40222421e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93146978e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

MOBA_AVX512 inline float largest(const float* values, int64_t count) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 best[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  // The second operand is what remains of a comparison with NaN.
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j] = _mm512_max_ps(_mm512_loadu_ps(values + i + j * kLanes), best[j]);
  }
  for (; i < count; i += kLanes) {
    best[0] = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, first_lanes(count - i), values + i), best[0]);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(best[0], best[1]), _mm512_max_ps(best[2], best[3])));
}

// 16 terms of a left operand's row.
MOBA_AVX512 inline void store_terms(float* to, __mmask16 lanes, __m512 values) {
  _mm512_mask_storeu_ps(to, lanes, values);
}
MOBA_AVX512 inline void store_terms(Pair* to, __mmask16 lanes, __m512 values) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

// Units that hold the terms of two rows each: (first, second) for each key.
MOBA_AVX512 inline void store_pairs(Pair* to, __mmask16 lanes, __m512 first, __m512 second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  _mm512_mask_storeu_epi32(to, lanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

struct GradientRow {
  const float *scores, *dp;
  __m512 lse, delta, scale;
  int64_t visible;
};

// Probabilities and gradients of 16 scores of a row, 0 where masked.
MOBA_AVX512 inline void gradients_at(const GradientRow& row, int64_t key, __m512* p, __m512* ds) {
  const __mmask16 seen = first_lanes(row.visible - key);
  const __m512 scores = _mm512_maskz_loadu_ps(seen, row.scores + key);
  const __m512 dp = _mm512_maskz_loadu_ps(seen, row.dp + key);
  *p = _mm512_maskz_mov_ps(seen, exp_of_nonpositive(_mm512_sub_ps(scores, row.lse)));
  *ds = _mm512_mul_ps(_mm512_maskz_mul_ps(seen, *p, _mm512_sub_ps(dp, row.delta)), row.scale);
}

MOBA_AVX512 inline GradientRow gradient_row(const Scores<float>& scores, Matrix<float> dp, const float* lse,
                                            const float* delta, float scale, int64_t i) {
  return {scores.matrix[i], dp[i], _mm512_set1_ps(lse[i]), _mm512_set1_ps(delta[i]), _mm512_set1_ps(scale),
          scores.visible[i]};
}

}  // namespace

bool available() {
  // ATEN_CPU_CAPABILITY=default turns libtorch's own kernels back, and these too.
  static const bool found = at::get_cpu_capability() == "AVX512" && __builtin_cpu_supports("avx512bf16");
  return found;
}

template <typename U>
MOBA_AVX512 void multiply(int64_t m, int64_t n, int64_t k, float alpha, Left<U> left, Right<U> right, Into into,
                          Matrix<float> c) {
  const float* a = reinterpret_cast<const float*>(left.data);
  for (int64_t column = 0; column < n; column += 4 * kLanes) {
    const int64_t columns = std::min(n - column, 4 * kLanes);
    const int64_t vectors = (columns + kLanes - 1) / kLanes;
    const __mmask16 last = first_lanes(columns - (vectors - 1) * kLanes);
    const float* b = reinterpret_cast<const float*>(right.data) + column;
    const auto strip = vectors == 4   ? multiply_strip<U, 4>
                       : vectors == 3 ? multiply_strip<U, 3>
                       : vectors == 2 ? multiply_strip<U, 2>
                                      : multiply_strip<U, 1>;
    strip(m, k, alpha, a, left.row_stride, left.term_stride, b, right.stride, into, c.data + column, c.stride, last);
  }
}

template <typename U>
MOBA_AVX512 void to_probabilities(const Scores<float>& scores, float* maximum, float* sum, U* p, int64_t stride) {
  for (int64_t i = 0; i < scores.rows; ++i) {
    const float* row = scores.matrix[i];
    const int64_t visible = scores.visible[i];
    maximum[i] = largest(row, visible);
    // A row whose maximum is -inf has no finite score, and (-inf) - (-inf) would be NaN.
    const __m512 shift = _mm512_set1_ps(maximum[i] == -std::numeric_limits<float>::infinity() ? 0.0f : maximum[i]);
    __m512 total = _mm512_setzero_ps();
    for (int64_t key = 0; key < scores.keys; key += kLanes) {
      const __mmask16 seen = first_lanes(visible - key);
      const __m512 score = _mm512_maskz_loadu_ps(seen, row + key);
      const __m512 value = _mm512_maskz_mov_ps(seen, exp_of_nonpositive(_mm512_sub_ps(score, shift)));
      total = _mm512_add_ps(total, value);
      // A pair that only half belongs to the keys is filled up with 0.
      const __mmask16 kept = first_lanes(units<U>(scores.keys) * kTerms<U> - key);
      store_terms(p + i * stride + key / kTerms<U>, kept, value);
    }
    sum[i] = _mm512_reduce_add_ps(total);
  }
}

template <>
MOBA_AVX512 void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta,
                              float scale, const GradientOperands<float>& to) {
  for (int64_t i = 0; i < scores.rows; ++i) {
    const GradientRow row = gradient_row(scores, dp, lse, delta, scale, i);
    for (int64_t key = 0; key < scores.keys; key += kLanes) {
      __m512 p, ds;
      gradients_at(row, key, &p, &ds);
      const __mmask16 kept = first_lanes(scores.keys - key);
      store_terms(to.p + i * to.stride + key, kept, p);
      store_terms(to.ds + i * to.stride + key, kept, ds);
    }
  }
}

template <>
MOBA_AVX512 void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta,
                              float scale, const GradientOperands<Pair>& to) {
  for (int64_t i = 0; i < scores.rows; i += 2) {
    const GradientRow first = gradient_row(scores, dp, lse, delta, scale, i);
    const bool two = i + 1 < scores.rows;
    GradientRow second = first;
    second.visible = 0;
    if (two) second = gradient_row(scores, dp, lse, delta, scale, i + 1);
    for (int64_t key = 0; key < scores.keys; key += kLanes) {
      __m512 p[2], ds[2];
      gradients_at(first, key, &p[0], &ds[0]);
      gradients_at(second, key, &p[1], &ds[1]);
      const __mmask16 lanes = first_lanes(scores.keys - key);
      store_pairs(to.p + i / 2 * to.stride + key, lanes, p[0], p[1]);
      store_pairs(to.ds + i / 2 * to.stride + key, lanes, ds[0], ds[1]);
      const __mmask16 kept = first_lanes(units<Pair>(scores.keys) * 2 - key);
      store_terms(to.ds_rows + i * to.rows_stride + key / 2, kept, ds[0]);
      if (two) store_terms(to.ds_rows + (i + 1) * to.rows_stride + key / 2, kept, ds[1]);
    }
  }
}

template void multiply(int64_t, int64_t, int64_t, float, Left<float>, Right<float>, Into, Matrix<float>);
template void multiply(int64_t, int64_t, int64_t, float, Left<Pair>, Right<Pair>, Into, Matrix<float>);
template void to_probabilities(const Scores<float>&, float*, float*, float*, int64_t);
template void to_probabilities(const Scores<float>&, float*, float*, Pair*, int64_t);

}  // namespace moba::cpu::avx512
