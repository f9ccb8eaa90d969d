#include "cuda/sm90/route/gate.cuh"

namespace moba::cuda::sm90 {

template struct Gate<__half, 128, 2>;
template struct Gate<__half, 128, 8>;
template struct Gate<__half, 128, 16>;
template struct Gate<__half, 128, 64>;

}  // namespace moba::cuda::sm90
