#include "cuda/sm90/current.cuh"

namespace moba::cuda::sm90::current {

template struct Current<__nv_bfloat16, 64, false>;
template struct Current<__nv_bfloat16, 64, true>;

}  // namespace moba::cuda::sm90::current
