// The best blocks of 16 rows, kept by one warp from step to step.
//
// Scores arrive as wgmma leaves them (see wgmma.cuh), latest blocks first. Groups of four scores, two columns of two
// rows, that reach the bound of their row are staged in a list of the lane, without branches. The bound comes from the
// maxima of classes of columns. When a list runs full, the bound is brought up to date and the lists are rid of what it
// excludes. If that does not help, and at the end, the warp merges what is staged into the kept blocks of its rows,
// which are exact and ordered; the score of the last kept block is then the bound, and later blocks win ties, so from
// then on a score has to be above it.
//
// Masked scores are NaN, and NaN reaches no bound: blocks with a NaN score are taken at the end, where numbers run out.
#pragma once

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/route/bound.cuh"
#include "cuda/sm90/route/plan.h"

namespace moba::cuda::sm90 {

// Numbers in the order of unsigned integers. Zeros are equal.
__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// The next number above; NaN above infinity.
__device__ __forceinline__ float above(uint32_t ordered_score) {
  const uint32_t next = ordered_score + 1;
  return __uint_as_float(next & 0x80000000u ? next & 0x7fffffffu : ~next);
}
// Ordered by (score, block).
__device__ __forceinline__ uint64_t gate_key(float score, uint32_t block) {
  return static_cast<uint64_t>(ordered(score)) << 32 | block;
}
__device__ __forceinline__ uint32_t score_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
__device__ __forceinline__ int block_of(uint64_t key) { return static_cast<int>(key & 0xffffffffu); }

// Read anew where it is needed: what depends on it would take registers all the time.
__device__ __forceinline__ int lane_of_warp() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

template <int kHeadDim, int kKept>
struct GateSelection {
  using P = GatePlan<kHeadDim, kKept>;
  static constexpr uint32_t kScoreStride = sizeof(float4) * 32, kGroupStride = sizeof(uint16_t) * 32;

  typename P::Warp& memory;
  const int wanted;  // blocks a row, at most kKept
  uint32_t list;     // of this lane: &memory.scores[0][lane]

  static constexpr int kNone = 0, kMaxima = 1, kBounds = 2;

  // Of this lane's rows, lane / 4 and lane / 4 + 8.
  float bound[2];
  uint32_t best[8];  // maxima of this lane's classes, columns 16 i .. 16 i + 15 of all steps: pairs for the two rows
  int news;              // kNone, or what has not reached the bounds or the lists yet
  uint32_t score_place;  // where the next entry of this lane goes

  __device__ __forceinline__ GateSelection(typename P::Warp& memory, int wanted)
      : memory(memory), wanted(wanted), list(shared_address(&memory.scores[0][lane_of_warp()])) {}

  __device__ __forceinline__ void restart() {
    score_place = list;
  }
  // Where the group of the scores at `place` lies.
  __device__ __forceinline__ uint32_t group_of(uint32_t place) const {
    return shared_address(&memory.groups[0]) +
           (place - shared_address(&memory.scores[0])) / (kScoreStride / kGroupStride);
  }
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
  __device__ __forceinline__ int entries() const {
    return static_cast<int>(score_place - list) / static_cast<int>(kScoreStride);
  }
  __device__ __forceinline__ bool full() const {
    return __any_sync(0xffffffffu, entries() > P::kEntries - P::kPartGroups);
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

  // Stages four scores if one of them reaches its bound, and `index` is below `count`.
  __device__ __forceinline__ void stage(const float* s, int index, int count, uint32_t group, uint32_t& group_place) {
    asm volatile(
        "{\n"
        ".reg .pred reached;\n"
        "setp.ge.f32 reached, %2, %6;\n"
        "setp.ge.or.f32 reached, %3, %6, reached;\n"
        "setp.ge.or.f32 reached, %4, %7, reached;\n"
        "setp.ge.or.f32 reached, %5, %7, reached;\n"
        "setp.lt.and.s32 reached, %11, %12, reached;\n"
        "@reached st.shared.v4.f32 [%0], {%2, %3, %4, %5};\n"
        "@reached st.shared.u16 [%1], %8;\n"
        "@reached add.u32 %0, %0, %9;\n"
        "@reached add.u32 %1, %1, %10;\n"
        "}"
        : "+r"(score_place), "+r"(group_place)
        : "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3]), "f"(bound[0]), "f"(bound[1]), "h"(static_cast<uint16_t>(group)),
          "n"(kScoreStride), "n"(kGroupStride), "r"(index), "r"(count)
        : "memory");
  }
  // Stages four scores unless both differences from the bounds have a sign; that of NaN has none.
  __device__ __forceinline__ void offer_signs(const float* s, float first, float second, uint32_t group,
                                              uint32_t& group_place) {
    asm volatile(
        "{\n"
        ".reg .pred reached;\n"
        ".reg .b32 signs;\n"
        "and.b32 signs, %6, %7;\n"
        "and.b32 signs, signs, 0x80000000;\n"
        "setp.eq.u32 reached, signs, 0;\n"
        "@reached st.shared.v4.f32 [%0], {%2, %3, %4, %5};\n"
        "@reached st.shared.u16 [%1], %8;\n"
        "@reached add.u32 %0, %0, %9;\n"
        "@reached add.u32 %1, %1, %10;\n"
        "}"
        : "+r"(score_place), "+r"(group_place)
        : "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3]), "f"(first - bound[0]), "f"(second - bound[1]),
          "h"(static_cast<uint16_t>(group)), "n"(kScoreStride), "n"(kGroupStride)
        : "memory");
  }
  // Of `first` and `second`, the larger ones of each row, one has to reach its bound.
  __device__ __forceinline__ void offer(const float* s, float first, float second, uint32_t group,
                                        uint32_t& group_place) {
    asm volatile(
        "{\n"
        ".reg .pred reached;\n"
        "setp.ge.f32 reached, %6, %8;\n"
        "setp.ge.or.f32 reached, %7, %9, reached;\n"
        "@reached st.shared.v4.f32 [%0], {%2, %3, %4, %5};\n"
        "@reached st.shared.u16 [%1], %10;\n"
        "@reached add.u32 %0, %0, %11;\n"
        "@reached add.u32 %1, %1, %12;\n"
        "}"
        : "+r"(score_place), "+r"(group_place)
        : "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3]), "f"(first), "f"(second), "f"(bound[0]), "f"(bound[1]),
          "h"(static_cast<uint16_t>(group)), "n"(kScoreStride), "n"(kGroupStride)
        : "memory");
  }
#ifndef YOUNG
#define YOUNG 2
#endif
#ifndef SIGNS
#define SIGNS 0
#endif
#ifndef DEEP
#define DEEP 8
#endif
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
        best[group / 2] = larger(best[group / 2], truncated(first, second));
      }
      if (SIGNS && P::kBounded) offer_signs(s, first, second, first_group + group, place);
      else offer(s, first, second, first_group + group, place);
    }
    if (kClasses) news = kMaxima;
  }

  // Lets the bound know all scores of this step before they are offered.
  __device__ __forceinline__ void look_ahead(const float (&scores)[64], int parts) {
    if constexpr (P::kBounded) {
#pragma unroll
      for (int part = 0; part < P::kParts; ++part) {
#pragma unroll
        for (int i = part * P::kPartGroups; part < parts && i < (part + 1) * P::kPartGroups; i += 2) {
          const float* s = scores + 4 * i;
          const float first = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[4], s[5]));
          const float second = fmaxf(fmaxf(s[2], s[3]), fmaxf(s[6], s[7]));
          best[i / 2] = larger(best[i / 2], truncated(first, second));
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
    // What is left to do: parts are counted down, from kSecond on those whose maxima the bound knows beforehand or does
    // not need any more; above them, a look ahead for rows without a good bound. The loop makes one copy of what
    // follows a full list.
    int part = first_part + (P::kBounded && taken >= DEEP ? kSecond : 0);
    if (P::kBounded && (taken < YOUNG || unbounded())) part = kLook;
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

  // Rids the lists of what the bounds of now exclude.
  __device__ __forceinline__ void filter() {
    const int staged = entries(), most = __reduce_max_sync(0xffffffffu, staged);
    uint32_t from = list, groups_from = group_of(list);
    restart();
    uint32_t place = groups_from;
#pragma unroll 1
    for (int first = 0; first < most; first += P::kAtOnce) {
      float4 s[P::kAtOnce];
      uint16_t group[P::kAtOnce];
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) {
        s[i] = shared_load_16(from + i * kScoreStride);
        group[i] = shared_load_2(groups_from + i * kGroupStride);
      }
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) stage(&s[i].x, i, staged - first, group[i], place);
      from += P::kAtOnce * kScoreStride;
      groups_from += P::kAtOnce * kGroupStride;
    }
  }

  // The staged scores that reach the bounds of now. Bit 2 i + c: column c of entry i.
  __device__ __forceinline__ void find_reached(uint32_t (&reached)[2]) {
    const int staged = entries(), most = __reduce_max_sync(0xffffffffu, staged);
    reached[0] = reached[1] = 0;
    uint32_t from = list;
#pragma unroll 1
    for (int first = 0; first < most; first += P::kAtOnce) {
      float4 s[P::kAtOnce];
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) s[i] = shared_load_16(from + i * kScoreStride);
      uint32_t found[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) {
        if (s[i].x >= bound[0]) found[0] |= 1u << 2 * i;
        if (s[i].y >= bound[0]) found[0] |= 2u << 2 * i;
        if (s[i].z >= bound[1]) found[1] |= 1u << 2 * i;
        if (s[i].w >= bound[1]) found[1] |= 2u << 2 * i;
      }
      reached[0] |= found[0] << 2 * first;
      reached[1] |= found[1] << 2 * first;
      from += P::kAtOnce * kScoreStride;
    }
    const uint32_t valid = (uint64_t(1) << 2 * staged) - 1;
    reached[0] &= valid;
    reached[1] &= valid;
  }

  // Merges everything staged into the kept blocks.
  __device__ __forceinline__ void merge_staged() {
    const int lane = lane_of_warp();
    uint32_t reached[2];
    find_reached(reached);
    restart();
    // One copy of the code for both rows, which change places.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      int kept = memory.counts[row];
#pragma unroll 1
      while (__any_sync(0xffffffffu, reached[0] != 0)) {
        const int count = gather_fresh(reached[0], half);
        merge_fresh(memory.kept[row], kept, count);
        kept = min(wanted, kept + count);
        if (kept == wanted && count > 0) bound[0] = above(score_of(memory.kept[row][wanted - 1]));
      }
      if (lane % 4 == 0) memory.counts[row] = kept;
      exchange(reached[0], reached[1]);
      exchange(bound[0], bound[1]);
    }
    __syncwarp();
  }
  template <class A>
  __device__ __forceinline__ static void exchange(A& a, A& b) {
    const A other = a;
    a = b;
    b = other;
  }

  // Moves up to kFresh of the reached scores of a row to memory.fresh, in any order, as pairs of block and score;
  // returns how many.
  __device__ __forceinline__ int gather_fresh(uint32_t& reached, int half) {
    const int lane = lane_of_warp(), own = __popc(reached);
    int end = own;
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, offset, 4);
      if (lane % 4 >= offset) end += before;
    }
    const int total = __shfl_sync(0xffffffffu, end, 3, 4);
    uint32_t mine = reached;
    if (__any_sync(0xffffffffu, total > P::kFresh)) {
      const int taken = max(min(end, P::kFresh) - (end - own), 0);
      while (__popc(mine) > taken) mine ^= 0x80000000u >> __clz(mine);
      __syncwarp();
    }
    reached ^= mine;
    uint32_t to = shared_address(&memory.fresh[lane / 4][0]) + (end - own) * sizeof(uint64_t);
    uint32_t from = list + half * 8, groups_from = group_of(list);
#pragma unroll 1
    while (__any_sync(0xffffffffu, mine != 0)) {
      float2 s[P::kAtOnce];
      uint32_t block[P::kAtOnce];
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) {
        s[i] = shared_load_8(from + i * kScoreStride);
        block[i] = shared_load_2(groups_from + i * kGroupStride) * 8u + lane % 4 * 2;
      }
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) {
        append(to, mine & 1u << 2 * i, block[i], s[i].x);
        append(to, mine & 2u << 2 * i, block[i] + 1, s[i].y);
      }
      mine >>= 2 * P::kAtOnce;
      from += P::kAtOnce * kScoreStride;
      groups_from += P::kAtOnce * kGroupStride;
    }
    __syncwarp();
    return min(total, P::kFresh);
  }
  __device__ __forceinline__ static void append(uint32_t& to, uint32_t really, uint32_t block, float score) {
    asm volatile(
        "{\n"
        ".reg .pred really;\n"
        "setp.ne.u32 really, %1, 0;\n"
        "@really st.shared.v2.b32 [%0], {%2, %3};\n"
        "@really add.u32 %0, %0, 8;\n"
        "}"
        : "+r"(to)
        : "r"(really), "r"(block), "r"(__float_as_uint(score))
        : "memory");
  }

  // Merges memory.fresh into `keys`, the first `before` of which are in use. A key's new place is the number of keys
  // above it; each of the four lanes of a row finds the places of every fourth key.
  __device__ __forceinline__ void merge_fresh(uint64_t* keys, int before, int count) {
    const int lane = lane_of_warp();
    constexpr int kOwn = P::kFresh / 4, kOld = (kKept + 3) / 4;
    const int part = lane % 4, most = __reduce_max_sync(0xffffffffu, count);
    uint64_t own[kOwn];
    int place[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      uint64_t& fresh = memory.fresh[lane / 4][4 * i + part];
      own[i] = 0;
      if (4 * i < most) {
        const uint64_t pair = fresh;
        if (4 * i + part < count) own[i] = gate_key(__uint_as_float(score_of(pair)), block_of(pair));
        fresh = own[i];
      }
    }
    __syncwarp();
    // By scores alone at first: equal ones show in places that do not add up.
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) place[i] = 0;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (4 * c < most) {
        uint64_t fresh[4];
        read_fresh(fresh, lane, c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kOwn; ++i) place[i] += score_of(fresh[k]) > score_of(own[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += own[i] != 0 ? place[i] : 0;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (__any_sync(0xffffffffu, sum != count * (count - 1) / 2)) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) place[i] = 0;
#pragma unroll 1
      for (int c = 0; 4 * c < most; ++c) {
        uint64_t fresh[4];
        read_fresh(fresh, lane, c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kOwn; ++i) place[i] += fresh[k] > own[i];
        }
      }
    }
    if (__any_sync(0xffffffffu, before != 0)) {
      uint64_t old[kOld];
      int old_place[kOld];
#pragma unroll
      for (int i = 0; i < kOld; ++i) {
        old[i] = 4 * i + part < before ? keys[4 * i + part] : 0;
        old_place[i] = 4 * i + part;
      }
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        if (4 * c < most) {
          uint32_t above = 0;  // by bytes: how many of this lane's old keys are above each of the four
          uint64_t fresh[4];
          read_fresh(fresh, lane, c);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < kOld; ++i) {
              if (fresh[k] > old[i]) {
                ++old_place[i];
              } else {
                above += 1u << 8 * k;
              }
            }
          }
          above += __shfl_xor_sync(0xffffffffu, above, 1);
          above += __shfl_xor_sync(0xffffffffu, above, 2);
          place[c] += above >> 8 * part & 0xff;
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kOld; ++i) {
        if (old[i] != 0 && old_place[i] < wanted) keys[old_place[i]] = old[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (own[i] != 0 && place[i] < wanted) keys[place[i]] = own[i];
    }
    __syncwarp();
  }
  __device__ __forceinline__ void read_fresh(uint64_t (&keys)[4], int lane, int chunk) const {
    const ulonglong2* fresh = reinterpret_cast<const ulonglong2*>(memory.fresh[lane / 4]);
    const ulonglong2 low = fresh[2 * chunk], high = fresh[2 * chunk + 1];
    keys[0] = low.x;
    keys[1] = low.y;
    keys[2] = high.x;
    keys[3] = high.y;
  }

  // Writes the routes of this lane's rows, which have `current` blocks before their own; null: no such row.
  __device__ __forceinline__ void finish(const int (&current)[2], int32_t* const (&route)[2]) {
    raise_bound();
    if (P::kBounded && write_staged(current, route)) return;
    merge_staged();
    write(current, route);
  }

  // Ranks what is staged and writes it, where nothing was merged before, numbers do not run out and no scores are
  // equal; else does nothing.
  __device__ __forceinline__ bool write_staged(const int (&current)[2], int32_t* const (&route)[2]) {
    constexpr int kOwn = P::kFresh / 4;
    static_assert(sizeof(memory.kept) >= sizeof(memory.fresh));
    const int lane = lane_of_warp(), part = lane % 4;
    uint32_t reached[2], to[2];
    int used[2], count[2];
    find_reached(reached);
    // The fresh blocks of the second rows take the place of the kept ones.
    const uint32_t fresh[2] = {shared_address(&memory.fresh[lane / 4][0]),
                               shared_address(&memory.kept[0][0]) + lane / 4 * (P::kFresh + 2) * 8};
    bool usual = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = __popc(reached[half]);
      int end = own;
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, end, offset, 4);
        if (part >= offset) end += before;
      }
      count[half] = __shfl_sync(0xffffffffu, end, 3, 4);
      used[half] = route[half] == nullptr ? 0 : max(min(wanted, current[half]), 0);
      to[half] = fresh[half] + (end - own) * 8;
      usual = usual && count[half] <= P::kFresh && count[half] >= used[half] && memory.counts[lane / 4 + 8 * half] == 0;
    }
    if (!__all_sync(0xffffffffu, usual)) return false;

    uint32_t from = list, groups_from = group_of(list);
#pragma unroll 1
    for (uint32_t first = reached[0], second = reached[1]; __any_sync(0xffffffffu, (first | second) != 0);
         first >>= 2 * P::kAtOnce, second >>= 2 * P::kAtOnce) {
      float4 s[P::kAtOnce];
      uint32_t block[P::kAtOnce];
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) {
        s[i] = shared_load_16(from + i * kScoreStride);
        block[i] = shared_load_2(groups_from + i * kGroupStride) * 8u + part * 2;
      }
#pragma unroll
      for (int i = 0; i < P::kAtOnce; ++i) {
        append(to[0], first & 1u << 2 * i, block[i], s[i].x);
        append(to[0], first & 2u << 2 * i, block[i] + 1, s[i].y);
        append(to[1], second & 1u << 2 * i, block[i], s[i].z);
        append(to[1], second & 2u << 2 * i, block[i] + 1, s[i].w);
      }
      from += P::kAtOnce * kScoreStride;
      groups_from += P::kAtOnce * kGroupStride;
    }
    __syncwarp();

    const int most = __reduce_max_sync(0xffffffffu, max(count[0], count[1]));
    float2 own[2][kOwn];
    int place[2][kOwn] = {};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own[half][i] = make_float2(0, NAN);
        if (4 * i >= most) continue;
        const uint32_t at = fresh[half] + (4 * i + part) * 8;
        if (4 * i + part < count[half]) {
          own[half][i] = shared_load_8(at);
        } else {
          shared_store_8(at, 0, __float_as_uint(NAN));
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (4 * c >= most) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 low = shared_load_16(fresh[half] + c * 32), high = shared_load_16(fresh[half] + c * 32 + 16);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          place[half][i] += low.y > own[half][i].y;
          place[half][i] += low.w > own[half][i].y;
          place[half][i] += high.y > own[half][i].y;
          place[half][i] += high.w > own[half][i].y;
        }
      }
    }
    // Places that equal scores share do not add up.
    bool different = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum += place[half][i];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      different = different && sum == count[half] * (count[half] - 1) / 2;
    }
    if (!__all_sync(0xffffffffu, different)) return false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (4 * i + part < count[half] && place[half][i] < used[half]) {
          route[half][1 + place[half][i]] = __float_as_int(own[half][i].x);
        }
      }
      if (route[half] == nullptr) continue;
      if (part == 0) route[half][0] = current[half];
      for (int slot = 1 + used[half] + part; slot <= wanted; slot += 4) route[half][slot] = -1;
    }
    return true;
  }

  // The same from the kept blocks.
  __device__ __forceinline__ void write(const int (&current)[2], int32_t* const (&route)[2]) {
    const int lane = lane_of_warp();
    const auto used = [&](int half) { return route[half] == nullptr ? 0 : min(wanted, current[half]); };
    const int kept[2] = {memory.counts[lane / 4], memory.counts[lane / 4 + 8]};
    if (__any_sync(0xffffffffu, kept[0] < used(0) || kept[1] < used(1))) {
      if (lane % 4 == 0) {
        complete(memory.kept[lane / 4], kept[0], used(0), current[0]);
        complete(memory.kept[lane / 4 + 8], kept[1], used(1), current[1]);
      }
      __syncwarp();
    }
#pragma unroll(kKept <= 16 ? (kKept + 4) / 4 : 1)
    for (int slot = lane % 4; slot <= wanted; slot += 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int block = current[half];
        if (slot > 0) block = slot <= used(half) ? block_of(memory.kept[lane / 4 + 8 * half][slot - 1]) : -1;
        if (route[half] != nullptr) route[half][slot] = block;
      }
    }
  }

  // Where numbers ran out, the scores of all other blocks are NaN, and the latest come first.
  __device__ __forceinline__ static void complete(uint64_t* keys, int kept, int used, int current) {
    int count = kept;
    for (int block = current - 1; count < used; --block) {
      bool known = false;
      for (int i = 0; i < kept; ++i) known = known || block_of(keys[i]) == block;
      if (!known) keys[count++] = static_cast<uint64_t>(block);
    }
  }
};

}  // namespace moba::cuda::sm90
