// Which calls the Hopper stages take: one list of conditions, for the operators and for what `select` tells the user.
#pragma once

#include <string>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// Routing up to this many slots; calls with more are routed by the portable stages.
constexpr int64_t kMaxSlots = 64;

// Empty if the Hopper stages take the call, else the first condition that does not hold: what was wanted and given.
std::string refusal(const Shape& shape, double softmax_scale, Dtype dtype);

}  // namespace moba::cuda::sm90
