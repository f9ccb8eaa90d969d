#include "cuda/sm90/past/past.cuh"

namespace moba::cuda::sm90 {

template struct Past<__half, 64, 64, true>;
template struct Past<__half, 64, 128, true>;
template struct Past<__half, 64, 128, false>;

}  // namespace moba::cuda::sm90
