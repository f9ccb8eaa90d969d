#include "cuda/sm90/past/past.cuh"

namespace moba::cuda::sm90 {

template struct Past<__nv_bfloat16, 128, 64, true>;
template struct Past<__nv_bfloat16, 128, 128, true>;
template struct Past<__nv_bfloat16, 128, 128, false>;

}  // namespace moba::cuda::sm90
