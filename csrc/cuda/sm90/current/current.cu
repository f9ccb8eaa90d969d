// Which current-block kernel takes a call, and the tensor maps and schedule it needs.
#include <algorithm>
#include <numeric>

#include "cuda/portable/numeric.cuh"
#include "cuda/sm90/current/current.h"
#include "cuda/sm90/current/plan.h"
#include "cuda/sm90/tensor_map.h"

namespace moba::cuda::sm90 {
namespace {

using namespace current;

// Keys and values that are in use at one time, to stay in the L2 cache (50 MB, of which reads of more than about half
// run at lower speed). Long blocks: at least so many, as the tiles of each go through its keys side by side.
constexpr int64_t kTogetherBytes = int64_t(20) << 20;
constexpr int64_t kTogether = 16;
// With partial results, blocks of up to so many tiles of queries are dealt in order, if there are so many that the
// shares come out even.
constexpr int64_t kInOrderSpan = 4;
constexpr int64_t kMaskedKeys = kMaskedSteps * kKeys;

// What a query costs by way of lists beside its products, in keys that it could be multiplied with in that time: once,
// and for each past block (the partial result).
constexpr int64_t kListCost = 1100;
constexpr int64_t kEntryCost = 110;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Without tiles where there are too many to count.
Schedule make_schedule(const CurrentParams& p, int64_t tile_rows, int64_t processors) {
  Shape shape = p.shape;
  const bool masked = p.route.data != nullptr, packed = shape.cu_seqlens_q != nullptr;
  if (masked) shape.block_size = std::max(shape.block_size, shape.keys);
  const int64_t group = shape.heads_per_key_head();
  const int64_t tiles = packed ? shape.rows / tile_rows + shape.sequences : ceil_divide(shape.rows, tile_rows);
  const int64_t span = packed ? tiles : std::min(ceil_divide(shape.block_size, tile_rows), tiles);
  const int64_t segments = ceil_divide(tiles, span);
  const int64_t units = p.lists.units_k.count * group;
  const int64_t segment_bytes = std::min(shape.block_size, shape.keys) * shape.head_dim * 4;
  // If that is not far off, as many as give all CTAs the same number of tiles.
  const int64_t wanted = std::max(kTogether, kTogetherBytes / segment_bytes);
  const int64_t together = wanted - wanted % std::min(wanted, processors / std::gcd(processors, span));
  const bool in_order = p.lists.positions != nullptr && span <= kInOrderSpan && units * segments >= processors;
  if (units * segments * span > INT32_MAX || shape.keys > INT32_MAX - kKeys) return {};
  const int64_t chosen_steps = std::clamp<int64_t>(p.shape.block_size / kKeys, 1, kMaskedSteps);
  return {
      .tiles = static_cast<int>(tiles),
      .span = static_cast<int>(span),
      .segments = static_cast<int>(segments),
      .together = static_cast<int>(in_order ? units * segments : std::min(together, units * segments)),
      .in_order = in_order,
      .unit_begin = static_cast<int>(p.lists.units_k.begin * group),
      .units = static_cast<int>(units),
      .heads = static_cast<int>(shape.heads),
      .heads_k = static_cast<int>(shape.heads_k),
      .heads_per_key_head = static_cast<int>(group),
      .rows = static_cast<int>(shape.rows),
      .keys = static_cast<int>(shape.keys),
      .block_size = static_cast<int>(std::min<int64_t>(shape.block_size, INT32_MAX)),
      .slots = static_cast<int>(shape.slots),
      .chosen_size = static_cast<int>(std::min<int64_t>(p.shape.block_size, kMaskedKeys)),
      .chosen_steps = static_cast<int>(chosen_steps),
      .chosen_bits = ~uint64_t(0) >> (kMaskedSteps - chosen_steps),
  };
}

template <class F>
cudaError_t with_kernel(const CurrentParams& p, Dtype dtype, F f) {
  const auto by_mode = [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (p.route.data != nullptr) return f(Current<T, kHeadDim, Mode::kMasked>{});
    if (p.lists.positions == nullptr) return f(Current<T, kHeadDim, Mode::kDense>{});
    return p.shape.block_size <= kKeys ? f(Current<T, kHeadDim, Mode::kShort>{})
                                       : f(Current<T, kHeadDim, Mode::kLong>{});
  };
  const auto by_head_dim = [&](auto type) {
    return p.shape.head_dim == 64 ? by_mode(type, std::integral_constant<int, 64>{})
                                  : by_mode(type, std::integral_constant<int, 128>{});
  };
  return dtype == Dtype::kHalf ? by_head_dim(Type<__half>{}) : by_head_dim(Type<__nv_bfloat16>{});
}

}  // namespace

bool query_major(const Shape& shape, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  if (shape.slots == 0 || shape.block_size % kKeys != 0 || max_seqlen_k > kMaskedKeys) return false;
  // A tile of few queries costs as much as a full one, and lists hold all heads of a key head together.
  if (max_seqlen_q < 2 * kRows && shape.heads_per_key_head() > 1) return false;
  const int64_t past = std::min(shape.slots, ceil_divide(max_seqlen_k, shape.block_size)) - 1;
  // By the queries of a tile together, at most.
  const int64_t chosen = (std::min<int64_t>(max_seqlen_q, 2 * kRows) * past + 1) * shape.block_size;
  const int64_t by_queries = std::min(max_seqlen_k - max_seqlen_q / 2 + kKeys / 2, chosen);
  const int64_t by_keys = kListCost + past * (shape.block_size + kEntryCost);
  return by_queries <= by_keys;
}

cudaError_t launch_current(const CurrentParams& p, Dtype dtype, cudaStream_t stream) {
  const Shape& shape = p.shape;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;

  const Extent rows{shape.groups, shape.heads, shape.rows, shape.head_dim};
  const Extent keys{shape.groups, shape.heads_k, shape.keys, shape.head_dim};
  CUtensorMap map_q, map_k, map_v;
  status = make_tensor_map(map_q, p.q, rows, kRows, dtype);
  if (status == cudaSuccess) status = make_tensor_map(map_k, p.k, keys, kKeys, dtype);
  if (status == cudaSuccess) status = make_tensor_map(map_v, p.v, keys, kKeys, dtype);
  if (status != cudaSuccess) return status;
  return with_kernel(p, dtype, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const Schedule schedule = make_schedule(p, Kernel::kTileRows, processors);
    if (schedule.tiles == 0) return cudaErrorInvalidValue;
    const unsigned grid = static_cast<unsigned>(std::min(processors, schedule.units * schedule.tiles));
    return Kernel::launch(p, map_q, map_k, map_v, schedule, grid, stream);
  });
}

}  // namespace moba::cuda::sm90
