// What the pipelines of all stages share: warpgroups, rings of buffers, exponentials to base 2.
#pragma once

#include <cstdint>

namespace moba::cuda::sm90 {

constexpr int kWarpgroup = 128;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A place in a ring of buffers with its barrier phase.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int count = 1) {
    slot += count;
    if (slot >= kSlots) {
      slot -= kSlots;
      phase ^= 1;
    }
  }
};

}  // namespace moba::cuda::sm90
