#include "cuda/sm90/current/current.cuh"

namespace moba::cuda::sm90::current {

template struct Current<__half, 128, Mode::kDense>;
template struct Current<__half, 128, Mode::kMasked>;
template struct Current<__half, 128, Mode::kShort>;
template struct Current<__half, 128, Mode::kLong>;

}  // namespace moba::cuda::sm90::current
