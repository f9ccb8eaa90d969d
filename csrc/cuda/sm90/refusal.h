// Which calls the Hopper stages take: one list of conditions, for the operators and for what `select` tells the user.
#pragma once

#include <string>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// Routing up to this many slots; calls with more are routed by the portable stages.
constexpr int64_t kMaxSlots = 64;

// Empty if the Hopper stages take the call, else the first condition that does not hold: what was wanted and given.
std::string refusal(const Shape& shape, double softmax_scale, Dtype dtype);

// Whether the rows start at multiples of 16 bytes and a tensor map can hold the strides. Contiguous tensors that are not
// refused always pass.
bool regular(const Source& source, int64_t groups, int64_t heads, int64_t rows);

}  // namespace moba::cuda::sm90
