// Top-k of a row without branches on its scores.
#include <bit>
#include <limits>

#include "avx512.h"

namespace moba::cpu::avx512 {
namespace {

constexpr int32_t kNan = std::numeric_limits<int32_t>::min();

// Integers in the order of the numbers: -0 equals 0, NaN is below everything.
MOBA_AVX512 inline __m512i ordered(__m512 values) {
  const __m512i bits = _mm512_castps_si512(_mm512_add_ps(values, _mm512_setzero_ps()));
  const __m512i flipped = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
  return _mm512_mask_set1_epi32(flipped, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), kNan);
}

// For each of the first `count` lanes, how many others go before it: larger ones, and equal ones in later lanes.
MOBA_AVX512 inline __m512i ranks(__m512i keys, int64_t count) {
  __m512i rank = _mm512_setzero_si512();
  for (int64_t lane = 0; lane < count; ++lane) {
    const __m512i other = _mm512_permutexvar_epi32(_mm512_set1_epi32(static_cast<int>(lane)), keys);
    const __mmask16 later = _mm512_cmpeq_epi32_mask(other, keys) & first_lanes(lane);
    const __mmask16 before = _mm512_cmpgt_epi32_mask(other, keys) | later;
    rank = _mm512_mask_add_epi32(rank, before, rank, _mm512_set1_epi32(1));
  }
  return rank;
}

}  // namespace

bool best_of(const float* scores, int64_t count, int64_t wanted, int32_t* indices) {
  if (wanted > kLanes) return false;
  // The `wanted`-th largest of the lanes' maxima: so many scores reach it, and few more.
  const float lowest = -std::numeric_limits<float>::infinity();
  __m512 maxima = _mm512_set1_ps(lowest);
  for (int64_t i = 0; i < count; i += kLanes) {
    maxima = _mm512_max_ps(_mm512_mask_loadu_ps(maxima, first_lanes(count - i), scores + i), maxima);
  }
  const __m512i lane_keys = ordered(maxima);
  const __mmask16 reaching = _mm512_cmplt_epi32_mask(ranks(lane_keys, kLanes), _mm512_set1_epi32(wanted));
  int32_t bound = _mm512_mask_reduce_min_epi32(reaching, lane_keys);
  // Where numbers are too few, NaN fills up.
  if (bound == _mm512_cvtsi512_si32(ordered(_mm512_set1_ps(lowest)))) bound = kNan;
  alignas(64) int32_t keys[2 * kLanes], places[2 * kLanes];
  int64_t found = 0;
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512i offered = ordered(_mm512_maskz_loadu_ps(lanes, scores + i));
    const __mmask16 taken = _mm512_mask_cmpge_epi32_mask(lanes, offered, _mm512_set1_epi32(bound));
    const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(i)));
    _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(taken, offered));
    _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(taken, place));
    found += std::popcount(static_cast<uint16_t>(taken));
    if (found > kLanes) return false;
  }
  const __m512i rank = ranks(_mm512_load_si512(keys), found);
  const __mmask16 chosen = _mm512_mask_cmplt_epi32_mask(first_lanes(found), rank, _mm512_set1_epi32(wanted));
  _mm512_mask_i32scatter_epi32(indices, chosen, rank, _mm512_load_si512(places), sizeof(int32_t));
  return true;
}

}  // namespace moba::cpu::avx512
