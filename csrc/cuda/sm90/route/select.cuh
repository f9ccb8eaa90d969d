// The best blocks of 16 rows, kept by one warp from step to step.
//
// Scores arrive as wgmma leaves them (see wgmma.cuh), latest blocks first. Groups of four scores, two columns of two
// rows, that reach the bound of their row are staged in a list of the lane, without branches. The bound comes from the
// maxima of classes of columns. When a list runs full, the bound is brought up to date and the lists are rid of what it
// excludes. If that does not help, the warp merges what is staged into the kept blocks of its rows, which are exact and
// ordered; the score of the last kept block is then the bound, and later blocks win ties, so from then on a score has
// to be above it. What is staged at the end is ranked and written, or merged as well where it has to be.
//
// Masked scores are NaN, and NaN reaches no bound: blocks with a NaN score are taken at the end, where numbers run out.
#pragma once

#include "cuda/sm90/route/bound.cuh"
#include "cuda/sm90/route/ranks.cuh"

namespace moba::cuda::sm90 {

template <int kHeadDim, int kKept>
struct GateSelection : GateRanks<kHeadDim, kKept> {
  using Base = GateRanks<kHeadDim, kKept>;
  using Base::Base;
  using Base::bound;
  using Base::filter;
  using Base::full;
  using Base::group_of;
  using Base::list;
  using Base::memory;
  using Base::merge_staged;
  using Base::offer;
  using Base::restart;
  using Base::score_place;
  using Base::stage;
  using Base::wanted;
  using Base::write;
  using Base::write_staged;
  using typename Base::P;

  static constexpr int kNone = 0, kMaxima = 1, kBounds = 2;

  uint32_t best[8];  // maxima of this lane's classes, columns 8 i + 64 j .. 8 i + 64 j + 7 of all steps: pairs for its
                     // two rows
  int news;          // kNone, or what has not reached the bounds or the lists yet

  // Rows that do not exist have a bound that hardly anything reaches.
  __device__ __forceinline__ void begin(bool first_row, bool second_row) {
    bound[0] = first_row ? -INFINITY : INFINITY;
    bound[1] = second_row ? -INFINITY : INFINITY;
    const int lane = lane_of_warp();
    if (lane < 16) memory.counts[lane] = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) best[i] = kMinusInfinities;
    news = kNone;
    restart();
  }
  __device__ __forceinline__ bool unbounded() const {
    return __any_sync(0xffffffffu, P::kBounded && (bound[0] == -INFINITY || bound[1] == -INFINITY));
  }

  __device__ __forceinline__ void raise_bound() {
    if (news != kMaxima) return;
    news = kBounds;
    if constexpr (P::kBounded) {
      const uint32_t found = largest_of_quad<kKept>(best, wanted);
      bound[0] = fmaxf(bound[0], lower_bound(found & 0xffff));
      bound[1] = fmaxf(bound[1], lower_bound(found >> 16));
    }
  }

  template <int kPart, bool kClasses>
  __device__ __forceinline__ void offer_part(const float (&scores)[64], uint32_t first_group) {
    uint32_t place = group_of(score_place);
#pragma unroll
    for (int i = P::kPartGroups - 1; i >= 0; --i) {
      const int group = kPart * P::kPartGroups + i;
      const float* s = scores + 4 * group;
      if constexpr (P::kBounded && !kClasses) {
        stage(s, 0, 1, first_group + group, place);
        continue;
      }
      const float first = fmaxf(s[0], s[1]), second = fmaxf(s[2], s[3]);
      if constexpr (P::kBounded) {
        best[group % 8] = larger(best[group % 8], truncated(first, second));
      }
      offer(s, first, second, first_group + group, place);
    }
    if (kClasses) news = kMaxima;
  }

  // Lets the bound know all scores of this step before they are offered.
  __device__ __forceinline__ void look_ahead(const float (&scores)[64], int parts) {
    if constexpr (P::kBounded) {
#pragma unroll
      for (int part = 0; part < P::kParts; ++part) {
#pragma unroll
        for (int i = part * P::kPartGroups; part < parts && i < (part + 1) * P::kPartGroups; ++i) {
          const float* s = scores + 4 * i;
          best[i % 8] = larger(best[i % 8], truncated(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])));
        }
      }
      news = kMaxima;
    }
  }

  // Takes the scores of one step; the last step has number 0. No row has candidates from block `end` on.
  __device__ __forceinline__ void take(const float (&scores)[64], int step, int end) {
    const uint32_t first_group = step * kGateGroups;
    constexpr int kPartColumns = P::kPartGroups * 8;
    const int first_part = min(end - 1 - step * kGateMeans, kGateMeans - 1) / kPartColumns;
    const int taken = (end - 1) / kGateMeans - step;  // steps
    // What is left to do: parts are counted down, from kSecond on those whose maxima the bound knows beforehand; above
    // them, a look ahead for rows without a good bound. The loop makes one copy of what follows a full list.
    int part = P::kBounded && (taken < P::kLookAhead || unbounded()) ? kLook : first_part;
#pragma unroll 1
    for (;;) {
      const bool look = P::kBounded && part == kLook;
      bool crowded = false;
      if (look) {
        look_ahead(scores, first_part + 1);
      } else if (P::kBounded && part >= kSecond) {
        crowded = offer_parts<false>(scores, first_group, part, step);
      } else {
        crowded = offer_parts<true>(scores, first_group, part, step);
      }
      if (look || crowded) {
        raise_bound();
        if (look) {
          part = kSecond + first_part;
          continue;
        }
        if (P::kBounded && news == kBounds) {
          news = kNone;
          filter();
          crowded = full();
        }
        if (crowded) merge_staged();
      }
      if (part < 0 || part == kSecond - 1) break;
    }
  }
  static constexpr int kSecond = 2 * P::kParts, kLook = 4 * P::kParts;

  // From `part` on, until a list may run full.
  template <bool kClasses>
  __device__ __forceinline__ bool offer_parts(const float (&scores)[64], uint32_t first_group, int& part, int step) {
    constexpr int kFirst = kClasses ? 0 : kSecond;
    static_assert(P::kParts == 4);
    if (part == kFirst + 3) {
      offer_part<3, kClasses>(scores, first_group);
      --part;
      if (full()) return true;
    }
    if (part == kFirst + 2) {
      offer_part<2, kClasses>(scores, first_group);
      --part;
      if (full()) return true;
    }
    if (part == kFirst + 1) {
      offer_part<1, kClasses>(scores, first_group);
      --part;
      if (full()) return true;
    }
    offer_part<0, kClasses>(scores, first_group);
    --part;
    return step > 0 && full();
  }

  // Writes the routes of this lane's rows, which have `current` blocks before their own; null: no such row.
  __device__ __forceinline__ void finish(const int (&current)[2], int32_t* const (&route)[2]) {
    raise_bound();
    if (P::kBounded && write_staged(current, route)) return;
    merge_staged();
    write(current, route);
  }
};

}  // namespace moba::cuda::sm90
