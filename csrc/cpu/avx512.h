// What avx512.cpp has for machines with AVX-512 and its bfloat16 dot products (AMD Zen 4, Intel Cooper Lake and
// Sapphire Rapids, and newer). Same contracts as in products.h.
#pragma once

#include <immintrin.h>

#include "products.h"

// Compiled for these instructions whatever the build's target is; `available` guards every call.
#define MOBA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace moba::cpu::avx512 {

bool available();

constexpr int64_t kLanes = 16;

// The first `count` lanes: none if it is negative.
MOBA_AVX512 inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << std::max<int64_t>(count, 0)) - 1);
}

template <typename U>
MOBA_AVX512 void multiply(int64_t m, int64_t n, int64_t k, float alpha, Left<U> a, Right<U> b, Into into,
                          Matrix<float> c);

template <typename U>
MOBA_AVX512 void to_probabilities(const Scores<float>& scores, float* maximum, float* sum, U* p, int64_t stride);

template <typename U>
MOBA_AVX512 void to_gradients(const Scores<float>& scores, Matrix<float> dp, const float* lse, const float* delta,
                              float scale, const GradientOperands<U>& to);

// Writes the indices of the `wanted` best of `count` scores, best first: of equal scores the later one, NaN after every
// number. Takes up to 16 of up to 256 scores; returns false, and has written nothing, where it does not apply.
MOBA_AVX512 bool best_of(const float* scores, int64_t count, int64_t wanted, int32_t* indices);

}  // namespace moba::cpu::avx512
