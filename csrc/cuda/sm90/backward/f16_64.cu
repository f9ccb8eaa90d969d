#include "cuda/sm90/backward/products.cuh"

namespace moba::cuda::sm90::backward {

template struct Products<__half, 64>;

}  // namespace moba::cuda::sm90::backward
