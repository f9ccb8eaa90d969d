// Ranks candidates of 16 rows by (score, block): the later block wins a tie, NaN stands below every number, -0 equals
// +0. What was ranked is kept, exact and ordered, until the routes are written.
#pragma once

#include "cuda/sm90/route/lists.cuh"

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
struct GateRanks : GateLists<kHeadDim, kKept> {
  using Base = GateLists<kHeadDim, kKept>;
  using Base::bound;
  using Base::find_reached;
  using Base::group_of;
  using Base::kGroupStride;
  using Base::kScoreStride;
  using Base::list;
  using Base::memory;
  using Base::restart;
  using typename Base::P;

  const int wanted;  // blocks a row, at most kKept

  __device__ __forceinline__ GateRanks(typename P::Warp& memory, int wanted) : Base(memory), wanted(wanted) {}

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
      __syncwarp();
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

  // Moves up to kFresh of the reached scores of a row to memory.fresh, as keys, with zeros behind them; returns how
  // many.
  __device__ __forceinline__ int gather_fresh(uint32_t& reached, int half) {
    const int lane = lane_of_warp();
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
    const int lane = lane_of_warp();
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
    if (!__all_sync(0xffffffffu, different)) {
      __syncwarp();
      return false;
    }
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
