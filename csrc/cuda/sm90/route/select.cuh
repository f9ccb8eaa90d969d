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

template <int kHeadDim, int kKept>
struct GateSelection {
  using P = GatePlan<kHeadDim, kKept>;
  static constexpr uint32_t kScoreStride = sizeof(float4) * 32, kGroupStride = sizeof(uint16_t) * 32;

  typename P::Warp& memory;
  const int wanted;  // blocks a row, at most kKept
  const int lane;

  // Of this lane's rows, lane / 4 and lane / 4 + 8.
  float bound[2];
  uint32_t best[8];  // maxima of this lane's classes, columns 16 i .. 16 i + 15 of all steps: pairs for the two rows
  int kept[2];
  bool outdated;                      // the bound does not know all of `best`
  int young;                          // steps to come whose scores the bound should know beforehand
  uint32_t score_place, group_place;  // where the next entry of this lane goes

  __device__ __forceinline__ GateSelection(typename P::Warp& memory, int wanted)
      : memory(memory), wanted(wanted), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void restart() {
    score_place = shared_address(&memory.scores[0][lane]);
    group_place = shared_address(&memory.groups[0][lane]);
  }
  // Rows that do not exist have a bound that hardly anything reaches.
  __device__ __forceinline__ void begin(bool first_row, bool second_row) {
    bound[0] = first_row ? -INFINITY : INFINITY;
    bound[1] = second_row ? -INFINITY : INFINITY;
    kept[0] = kept[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) best[i] = kMinusInfinities;
    outdated = false;
    young = 2;
    restart();
  }
  __device__ __forceinline__ int entries() const {
    return static_cast<int>(score_place - shared_address(&memory.scores[0][lane])) / static_cast<int>(kScoreStride);
  }
  __device__ __forceinline__ bool full() const {
    return __any_sync(0xffffffffu, entries() > P::kEntries - P::kPartGroups);
  }

  __device__ __forceinline__ bool unbounded() const {
    return __any_sync(0xffffffffu, P::kBounded && (bound[0] == -INFINITY || bound[1] == -INFINITY));
  }

  __device__ __forceinline__ void raise_bound() {
    if (!outdated) return;
    outdated = false;
    if constexpr (P::kBounded) {
      const uint32_t found = largest_of_quad<kKept>(best, wanted);
      bound[0] = fmaxf(bound[0], lower_bound(found & 0xffff));
      bound[1] = fmaxf(bound[1], lower_bound(found >> 16));
    }
  }

  // Stages four scores if one of them reaches its bound. `first` and `second` are the larger ones of each row.
  __device__ __forceinline__ void offer(const float* s, float first, float second, uint32_t group) {
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
  template <int kPart>
  __device__ __forceinline__ void offer_part(const float (&scores)[64], uint32_t first_group) {
#pragma unroll
    for (int i = P::kPartGroups - 1; i >= 0; --i) {
      const int group = kPart * P::kPartGroups + i;
      const float* s = scores + 4 * group;
      const float first = fmaxf(s[0], s[1]), second = fmaxf(s[2], s[3]);
      if constexpr (P::kBounded) {
        best[group / 2] = larger(best[group / 2], truncated(first, second));
      }
      offer(s, first, second, first_group + group);
    }
    outdated = true;
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
      outdated = true;
    }
  }

  // Takes the scores of one step, whose first `columns` hold candidates; the last step has number 0.
  __device__ __forceinline__ void take(const float (&scores)[64], int step, int columns) {
    const uint32_t first_group = step * kGateGroups;
    constexpr int kPartColumns = P::kPartGroups * 8;
    const int first_part = min(columns - 1, kGateMeans - 1) / kPartColumns;
    // Down from a part that does not exist, for rows without a good bound. The loop makes one copy of what follows a
    // part.
#pragma unroll 1
    for (int part = young > 0 || unbounded() ? P::kParts : first_part; part >= 0;
         part = part == P::kParts ? first_part : part - 1) {
      if (part == P::kParts) look_ahead(scores, first_part + 1);
      if (part == 3) offer_part<3>(scores, first_group);
      if (part == 2) offer_part<2>(scores, first_group);
      if (part == 1) offer_part<1>(scores, first_group);
      if (part == 0) offer_part<0>(scores, first_group);
      const bool first = part == P::kParts, last = step == 0 && part == 0;
      if (!first && !last && !full()) continue;
      raise_bound();
      if (first) {
        --young;
        continue;
      }
      if (!last && P::kBounded) {
        filter();
        if (!full()) continue;
      }
      merge_staged();
    }
  }

  // Rids the lists of what the bounds of now exclude.
  __device__ __forceinline__ void filter() {
    const int staged = entries(), most = __reduce_max_sync(0xffffffffu, staged);
    restart();
#pragma unroll 1
    for (int first = 0; first < most; first += 4) {
      float4 s[4];
      uint16_t group[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i] = memory.scores[min(first + i, P::kEntries - 1)][lane];
        group[i] = memory.groups[min(first + i, P::kEntries - 1)][lane];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = first + i < staged;
        offer(&s[i].x, valid ? fmaxf(s[i].x, s[i].y) : NAN, valid ? fmaxf(s[i].z, s[i].w) : NAN, group[i]);
      }
    }
  }

  // The staged scores that reach the bounds of now. Bit 2 i + c: column c of entry i.
  __device__ __forceinline__ void find_reached(uint32_t (&reached)[2]) {
    const int staged = entries(), most = __reduce_max_sync(0xffffffffu, staged);
    reached[0] = reached[1] = 0;
#pragma unroll 1
    for (int first = 0; first < most; first += 4) {
      float4 s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = memory.scores[min(first + i, P::kEntries - 1)][lane];
      uint32_t found[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (s[i].x >= bound[0]) found[0] |= 1u << 2 * i;
        if (s[i].y >= bound[0]) found[0] |= 2u << 2 * i;
        if (s[i].z >= bound[1]) found[1] |= 1u << 2 * i;
        if (s[i].w >= bound[1]) found[1] |= 2u << 2 * i;
      }
      const int valid = min(max(staged - first, 0), 4);
      const uint32_t mask = (1u << 2 * valid) - 1;
      reached[0] |= (found[0] & mask) << 2 * first;
      reached[1] |= (found[1] & mask) << 2 * first;
    }
  }

  // Merges everything staged into the kept blocks.
  __device__ __forceinline__ void merge_staged() {
    uint32_t reached[2];
    find_reached(reached);
    restart();
    // One copy of the code for both rows, which change places.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
#pragma unroll 1
      while (__any_sync(0xffffffffu, reached[0] != 0)) {
        const int count = gather_fresh(reached[0], half);
        merge_fresh(memory.kept[row], kept[0], count);
        kept[0] = min(wanted, kept[0] + count);
        if (kept[0] == wanted && count > 0) bound[0] = above(score_of(memory.kept[row][wanted - 1]));
      }
      exchange(reached[0], reached[1]);
      exchange(kept[0], kept[1]);
      exchange(bound[0], bound[1]);
    }
  }
  template <class A>
  __device__ __forceinline__ static void exchange(A& a, A& b) {
    const A other = a;
    a = b;
    b = other;
  }

  // Moves up to kFresh of the reached scores of a row to memory.fresh, as keys, with zeros behind them; returns how
  // many.
  __device__ __forceinline__ int gather_fresh(uint32_t& reached, int half) {
    constexpr int kWords = sizeof(memory.fresh) / sizeof(uint4);
    uint4* words = reinterpret_cast<uint4*>(memory.fresh);
#pragma unroll
    for (int i = 0; i < (kWords + 31) / 32; ++i) {
      if (i * 32 + lane < kWords) words[i * 32 + lane] = make_uint4(0, 0, 0, 0);
    }
    const int own = __popc(reached);
    int end = own;
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, offset, 4);
      if (lane % 4 >= offset) end += before;
    }
    const int total = __shfl_sync(0xffffffffu, end, 3, 4);
    uint64_t* to = memory.fresh[lane / 4] + end - own;
    const int taken = max(min(end, P::kFresh) - (end - own), 0), most = __reduce_max_sync(0xffffffffu, taken);
    __syncwarp();
#pragma unroll 2
    for (int i = 0; i < most; ++i) {
      const int bit = max(__ffs(reached) - 1, 0);
      const float score = reinterpret_cast<const float*>(&memory.scores[bit / 2][lane])[2 * half + bit % 2];
      const uint32_t block = memory.groups[bit / 2][lane] * 8u + lane % 4 * 2 + bit % 2;
      if (i < taken) {
        to[i] = gate_key(score, block);
        reached &= reached - 1;
      }
    }
    __syncwarp();
    return min(total, P::kFresh);
  }

  // Merges memory.fresh into `keys`, the first `before` of which are in use. A key's new place is the number of keys
  // above it; each of the four lanes of a row finds the places of every fourth key.
  __device__ __forceinline__ void merge_fresh(uint64_t* keys, int before, int count) {
    constexpr int kOwn = P::kFresh / 4, kOld = (kKept + 3) / 4;
    const int part = lane % 4, most = __reduce_max_sync(0xffffffffu, count);
    uint64_t own[kOwn];
    int place[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = memory.fresh[lane / 4][4 * i + part];
      place[i] = 0;
    }
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (4 * c < most) {
        uint64_t fresh[4];
        read_fresh(fresh, c);
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
          read_fresh(fresh, c);
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
  __device__ __forceinline__ void read_fresh(uint64_t (&keys)[4], int chunk) const {
    const ulonglong2* fresh = reinterpret_cast<const ulonglong2*>(memory.fresh[lane / 4]);
    const ulonglong2 low = fresh[2 * chunk], high = fresh[2 * chunk + 1];
    keys[0] = low.x;
    keys[1] = low.y;
    keys[2] = high.x;
    keys[3] = high.y;
  }

  // Writes the routes of this lane's rows, which have `current` blocks before their own; null: no such row.
  __device__ __forceinline__ void write(const int (&current)[2], int32_t* const (&route)[2]) {
    const auto used = [&](int half) { return route[half] == nullptr ? 0 : min(wanted, current[half]); };
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
