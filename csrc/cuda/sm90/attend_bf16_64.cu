#include "cuda/sm90/attend.cuh"

namespace moba::cuda::sm90 {

template struct Attend<__nv_bfloat16, 64, 64, true>;
template struct Attend<__nv_bfloat16, 64, 128, true>;
template struct Attend<__nv_bfloat16, 64, 128, false>;

}  // namespace moba::cuda::sm90
