#include "cuda/sm90/route/gate.cuh"

namespace moba::cuda::sm90 {

template struct Gate<__half, 64, 2>;
template struct Gate<__half, 64, 8>;
template struct Gate<__half, 64, 16>;
template struct Gate<__half, 64, 64>;

}  // namespace moba::cuda::sm90
