// Candidates of 16 rows on their way to being ranked: each lane of a warp has a list of groups of four scores, two
// columns of two rows, one of which reached the bound of its row.
#pragma once

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/route/plan.h"

namespace moba::cuda::sm90 {

// Read anew where it is needed: what depends on it would take registers all the time.
__device__ __forceinline__ int lane_of_warp() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

template <int kHeadDim, int kKept>
struct GateLists {
  using P = GatePlan<kHeadDim, kKept>;
  static constexpr uint32_t kScoreStride = sizeof(float4) * 32, kGroupStride = sizeof(uint16_t) * 32;

  typename P::Warp& memory;
  const uint32_t list;   // of this lane: &memory.scores[0][lane]
  uint32_t score_place;  // where its next entry goes
  float bound[2];        // of its rows, lane / 4 and lane / 4 + 8

  __device__ __forceinline__ explicit GateLists(typename P::Warp& memory)
      : memory(memory), list(shared_address(&memory.scores[0][lane_of_warp()])) {}

  __device__ __forceinline__ void restart() { score_place = list; }
  // Where the group of the scores at `place` lies.
  __device__ __forceinline__ uint32_t group_of(uint32_t place) const {
    return shared_address(&memory.groups[0]) +
           (place - shared_address(&memory.scores[0])) / (kScoreStride / kGroupStride);
  }
  __device__ __forceinline__ int entries() const {
    return static_cast<int>(score_place - list) / static_cast<int>(kScoreStride);
  }
  __device__ __forceinline__ bool full() const {
    return __any_sync(0xffffffffu, entries() > P::kEntries - P::kPartGroups);
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
};

}  // namespace moba::cuda::sm90
