// Which past kernel takes a call, and the tensor maps and schedule it needs.
#include <algorithm>

#include "cuda/portable/numeric.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/past/past.h"
#include "cuda/sm90/tensor_map.h"

namespace moba::cuda::sm90 {

namespace {

// Queries, keys and values of the units of one pass, to stay in the L2 cache (50 MB, of which reads of more than about
// half run at lower speed).
constexpr int64_t kPassBytes = int64_t(20) << 20;
constexpr int64_t kMaxPassUnits = 64;
// In tiles, for what shares get down to in the last pass: a share of a resident block loads it for so few.
constexpr int64_t kLeastResident = 3, kLeastStreamed = 2;

Extent keys_of(const Shape& shape) { return {shape.groups, shape.heads_k, shape.keys, shape.head_dim}; }

template <class F>
auto with_kernel(const Shape& shape, Dtype dtype, F f) {
  const auto by_block = [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (shape.block_size <= 64) return f(Past<T, kHeadDim, 64, true>{}, 64);
    if (shape.block_size <= kMaxResident) return f(Past<T, kHeadDim, 128, true>{}, 128);
    return f(Past<T, kHeadDim, 128, false>{}, 128);
  };
  const auto by_head_dim = [&](auto type) {
    return shape.head_dim == 64 ? by_block(type, std::integral_constant<int, 64>{})
                                : by_block(type, std::integral_constant<int, 128>{});
  };
  return dtype == Dtype::kHalf ? by_head_dim(Type<__half>{}) : by_head_dim(Type<__nv_bfloat16>{});
}

}  // namespace

cudaError_t launch_past(const PastParams& p, Dtype dtype, cudaStream_t stream) {
  const Shape& shape = p.shape;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t unit_bytes = (shape.rows * shape.heads_per_key_head() + 2 * shape.keys) * shape.head_dim * 2;
  const int64_t pass_units = std::min<int64_t>(std::max<int64_t>(1, kPassBytes / unit_bytes), kMaxPassUnits);
  const int64_t passes = (p.lists.units_k.count + pass_units - 1) / pass_units;
  if (passes * processors > INT32_MAX / 64) return cudaErrorInvalidValue;
  if (shape.blocks() < 2) return cudaSuccess;  // no past, and no room for tickets
  return with_kernel(shape, dtype, [&](auto past, int keys) {
    const int steps = static_cast<int>((shape.block_size + keys - 1) / keys);
    // Shorter ones would load resident blocks for too few tiles, or cut the pairs of tiles of streamed ones too often.
    const int64_t tiles = pass_units * capacity(shape) / kListTile / processors;  // of a CTA in a pass, at most
    const int64_t each = steps == 1 ? std::clamp<int64_t>(tiles / 8, 2, 4) : std::clamp<int64_t>(tiles / 16, 1, 2);
    const int shares = processors * static_cast<int>(each);
    const int64_t last_units = p.lists.units_k.count - (passes - 1) * pass_units;
    const int64_t last_tiles = std::min<int64_t>(last_units * capacity(shape) / kListTile, INT32_MAX);
    int levels = 1;
    while ((last_tiles >> levels) >= shares * (steps == 1 ? kLeastResident : kLeastStreamed)) ++levels;
    const Schedule schedule{
        .tickets = p.lists.counts,
        .pass_units = static_cast<int>(pass_units),
        .passes = static_cast<int>(passes),
        .pass_shares = shares,
        .last_levels = levels,
        .blocks = static_cast<int>(shape.blocks()),
        .heads_k = static_cast<int>(shape.heads_k),
        .group = static_cast<int>(shape.heads_per_key_head()),
        .steps = steps,
        .last_keys = static_cast<int>(shape.block_size - static_cast<int64_t>(steps - 1) * keys),
        .row_bytes = static_cast<uint32_t>(p.q.row * 2),
    };
    KeyMaps maps;
    cudaError_t made = make_tensor_map(maps.k, p.k, keys_of(shape), keys, dtype);
    if (made == cudaSuccess) made = make_tensor_map(maps.v, p.v, keys_of(shape), keys, dtype);
    if (made == cudaSuccess) made = make_tensor_map(maps.last_v, p.v, keys_of(shape), schedule.last_keys, dtype);
    return made != cudaSuccess ? made
                               : decltype(past)::launch(p, maps, schedule, static_cast<unsigned>(processors), stream);
  });
}

}  // namespace moba::cuda::sm90
