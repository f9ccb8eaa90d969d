#include "cuda/sm90/backward/products.cuh"

namespace moba::cuda::sm90::backward {

template struct Products<__nv_bfloat16, 64>;

}  // namespace moba::cuda::sm90::backward
