#include "cuda/sm90/current.cuh"

namespace moba::cuda::sm90::current {

template struct Current<__half, 64, false>;
template struct Current<__half, 64, true>;

}  // namespace moba::cuda::sm90::current
