#include "cuda/sm90/current.cuh"

namespace moba::cuda::sm90::current {

template struct Current<__half, 128, false>;
template struct Current<__half, 128, true>;

}  // namespace moba::cuda::sm90::current
