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

#include "cuda/sm90/gate_bound.cuh"
#include "cuda/sm90/gate_plan.h"
#include "cuda/sm90/ptx.cuh"

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
  float best[2][8];  // maxima of this lane's classes: columns 16 i .. 16 i + 15 of all steps
  int kept[2];
  bool outdated;                      // the bound does not know all of `best`
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
    for (int i = 0; i < 8; ++i) best[0][i] = best[1][i] = -INFINITY;
    outdated = false;
    restart();
  }
  __device__ __forceinline__ int entries() const {
    return static_cast<int>(score_place - shared_address(&memory.scores[0][lane])) / static_cast<int>(kScoreStride);
  }
  __device__ __forceinline__ bool full() const {
    return __any_sync(0xffffffffu, entries() > P::kEntries - P::kPartGroups);
  }

  __device__ __forceinline__ bool unbounded() const {
    return __any_sync(0xffffffffu, bound[0] == -INFINITY || bound[1] == -INFINITY);
  }

  __device__ __forceinline__ void raise_bound() {
    if (!outdated) return;
    outdated = false;
    if constexpr (P::kBounded) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        bound[half] = fmaxf(bound[half], largest_of_quad<kKept>(best[half], wanted));
      }
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
  __device__ __forceinline__ void offer_part(const float (&scores)[64], const float (&larger)[2][kGateGroups],
                                             uint32_t first_group) {
#pragma unroll
    for (int i = P::kPartGroups - 1; i >= 0; --i) {
      const int group = kPart * P::kPartGroups + i;
      const float* s = scores + 4 * group;
      const float first = P::kBounded ? larger[0][group] : fmaxf(s[0], s[1]);
      const float second = P::kBounded ? larger[1][group] : fmaxf(s[2], s[3]);
      offer(s, first, second, first_group + group);
    }
  }

  // Takes the scores of one step, whose first `columns` hold candidates; the last step has number 0.
  __device__ __forceinline__ void take(const float (&scores)[64], int step, int columns) {
    float larger[2][kGateGroups];
    if constexpr (P::kBounded) {
#pragma unroll
      for (int i = 0; i < kGateGroups; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          larger[half][i] = fmaxf(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]);
          best[half][i / 2] = fmaxf(best[half][i / 2], larger[half][i]);
        }
      }
    }
    outdated = true;
    const uint32_t first_group = step * kGateGroups;
    constexpr int kPartColumns = P::kPartGroups * 8;
    // Down from a part that does not exist, for rows without a bound. The loop makes one copy of what follows a part.
#pragma unroll 1
    for (int part = P::kParts; part >= 0;
         part = part == P::kParts ? min(columns - 1, kGateMeans - 1) / kPartColumns : part - 1) {
      if (part == 3) offer_part<3>(scores, larger, first_group);
      if (part == 2) offer_part<2>(scores, larger, first_group);
      if (part == 1) offer_part<1>(scores, larger, first_group);
      if (part == 0) offer_part<0>(scores, larger, first_group);
      const bool first = part == P::kParts, last = step == 0 && part == 0;
      if (!last && !(first ? unbounded() : full())) continue;
      raise_bound();
      if (first) continue;
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
        s[i] = memory.scores[first + i][lane];
        group[i] = memory.groups[first + i][lane];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 t = s[i];
        const bool reached = first + i < staged && (fmaxf(t.x, t.y) >= bound[0] || fmaxf(t.z, t.w) >= bound[1]);
        if (reached) {
          const int to = entries();
          memory.scores[to][lane] = t;
          memory.groups[to][lane] = group[i];
          score_place += kScoreStride;
          group_place += kGroupStride;
        }
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
      for (int i = 0; i < 4; ++i) s[i] = memory.scores[first + i][lane];
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
#pragma unroll 1
    while (__any_sync(0xffffffffu, (reached[0] | reached[1]) != 0)) {
      int count[2];
      gather_fresh(reached, count);
      if constexpr (kKept <= 8) {
        merge_fresh<0, 2>(count);
      } else {
        merge_fresh<0, 1>(count);
        merge_fresh<1, 1>(count);
      }
    }
  }

  // Moves up to kFresh of the reached scores of each row to memory.fresh, as keys, zero beyond the `count` of the row.
  __device__ __forceinline__ void gather_fresh(uint32_t (&reached)[2], int (&count)[2]) {
    constexpr int kWords = sizeof(memory.fresh) / sizeof(uint4);
    uint4* words = reinterpret_cast<uint4*>(memory.fresh);
#pragma unroll
    for (int i = 0; i < (kWords + 31) / 32; ++i) {
      if (i * 32 + lane < kWords) words[i * 32 + lane] = make_uint4(0, 0, 0, 0);
    }
    // Both counts of a lane in one word, summed over the lanes that share the rows.
    const uint32_t own = __popc(reached[0]) | __popc(reached[1]) << 16;
    uint32_t end = own;
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, end, offset, 4);
      if (lane % 4 >= offset) end += before;
    }
    const uint32_t total = __shfl_sync(0xffffffffu, end, 3, 4), begin = end - own;
    int at[2], last[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      count[half] = min(static_cast<int>(total >> 16 * half & 0xffff), P::kFresh);
      at[half] = begin >> 16 * half & 0xffff;
      last[half] = min(static_cast<int>(end >> 16 * half & 0xffff), P::kFresh);
    }
    __syncwarp();
    const int most = __reduce_max_sync(0xffffffffu, max(last[0] - at[0], last[1] - at[1]));
#pragma unroll 2
    for (int n = 0; n < most; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int bit = max(__ffs(reached[half]) - 1, 0);
        const float score = reinterpret_cast<const float*>(&memory.scores[bit / 2][lane])[2 * half + bit % 2];
        const uint32_t block = memory.groups[bit / 2][lane] * 8u + lane % 4 * 2 + bit % 2;
        if (at[half] < last[half]) {
          memory.fresh[lane / 4 + 8 * half][at[half]++] = gate_key(score, block);
          reached[half] &= reached[half] - 1;
        }
      }
    }
    __syncwarp();
  }

  // Merges memory.fresh into memory.kept for `kRows` of the two rows, from kFirst on. A key's new place is the number
  // of keys above it; each of the four lanes of a row finds the places of every fourth key.
  template <int kFirst, int kRows>
  __device__ __forceinline__ void merge_fresh(const int (&count)[2]) {
    constexpr int kOwn = P::kFresh / 4, kOld = (kKept + 3) / 4;
    const int part = lane % 4;
    uint64_t own[kRows][kOwn], old[kRows][kOld];
    int place[kRows][kOwn], old_place[kRows][kOld];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = lane / 4 + 8 * (kFirst + r);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        own[r][i] = memory.fresh[row][4 * i + part];
        place[r][i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kOld; ++i) old[r][i] = 0;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        uint64_t keys[4];
        read_fresh(keys, kFirst + r, c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kOwn; ++i) place[r][i] += keys[k] > own[r][i];
        }
      }
    }
    if (__any_sync(0xffffffffu, (kept[0] | kept[1]) != 0)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = lane / 4 + 8 * (kFirst + r);
#pragma unroll
        for (int i = 0; i < kOld; ++i) {
          if (4 * i + part < kept[kFirst + r]) old[r][i] = memory.kept[row][4 * i + part];
          old_place[r][i] = 4 * i + part;
        }
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          uint32_t above = 0;  // by bytes: how many of this lane's old keys are above each of the four
          uint64_t keys[4];
          read_fresh(keys, kFirst + r, c);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < kOld; ++i) {
              if (keys[k] > old[r][i]) {
                ++old_place[r][i];
              } else {
                above += 1u << 8 * k;
              }
            }
          }
          above += __shfl_xor_sync(0xffffffffu, above, 1);
          above += __shfl_xor_sync(0xffffffffu, above, 2);
          place[r][c] += above >> 8 * part & 0xff;
        }
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kOld; ++i) {
          if (old[r][i] != 0 && old_place[r][i] < wanted) {
            memory.kept[lane / 4 + 8 * (kFirst + r)][old_place[r][i]] = old[r][i];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (own[r][i] != 0 && place[r][i] < wanted) memory.kept[lane / 4 + 8 * (kFirst + r)][place[r][i]] = own[r][i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int half = kFirst + r;
      kept[half] = min(wanted, kept[half] + count[half]);
      if (kept[half] == wanted && count[half] > 0) {
        bound[half] = above(score_of(memory.kept[lane / 4 + 8 * half][wanted - 1]));
      }
    }
  }
  __device__ __forceinline__ void read_fresh(uint64_t (&keys)[4], int half, int chunk) const {
    const ulonglong2* fresh = reinterpret_cast<const ulonglong2*>(memory.fresh[lane / 4 + 8 * half]);
    const ulonglong2 low = fresh[2 * chunk], high = fresh[2 * chunk + 1];
    keys[0] = low.x;
    keys[1] = low.y;
    keys[2] = high.x;
    keys[3] = high.y;
  }

  // Writes the route of row lane / 4 + 8 half, which has `current` blocks before its own; null: no such row.
  __device__ __forceinline__ void write(int half, int current, int32_t* route) {
    uint64_t* keys = memory.kept[lane / 4 + 8 * half];
    const int used = route == nullptr ? 0 : min(wanted, current);
    if (lane % 4 == 0 && kept[half] < used) {
      // Fewer numbers than slots: the scores of all other blocks are NaN. The latest come first.
      int count = kept[half];
      for (int block = current - 1; count < used; --block) {
        bool known = false;
        for (int i = 0; i < kept[half]; ++i) known = known || block_of(keys[i]) == block;
        if (!known) keys[count++] = static_cast<uint64_t>(block);
      }
    }
    __syncwarp();
    if (route != nullptr) {
      for (int slot = lane % 4; slot <= wanted; slot += 4) {
        route[slot] = slot == 0 ? current : slot <= used ? block_of(keys[slot - 1]) : -1;
      }
    }
    __syncwarp();
  }
};

}  // namespace moba::cuda::sm90
