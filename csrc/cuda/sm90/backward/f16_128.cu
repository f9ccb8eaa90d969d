#include "cuda/sm90/backward/products.cuh"

namespace moba::cuda::sm90::backward {

template struct Products<__half, 128>;

}  // namespace moba::cuda::sm90::backward
