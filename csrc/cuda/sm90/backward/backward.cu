// Which Hopper backward pass takes a call, its workspace, and its stages in order.
#include <algorithm>

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward/backward.h"
#include "cuda/sm90/backward/work.h"

namespace moba::cuda::sm90 {

using namespace backward;

namespace {

// Up to how many bytes of dq in float of one key head it is summed in memory: so much stays in the L2 cache (50 MB).
// Twice as much where a block has several key tiles, each with its own partial dq to write and read. With four of them
// sums are the faster way at any length.
int64_t reduce_bytes(int64_t tiles) {
  constexpr int64_t kBytes = int64_t(32) << 20;
  return tiles >= 4 ? INT64_MAX : tiles > 1 ? 2 * kBytes : kBytes;
}

cudaError_t processors_of_device(int& processors) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status != cudaSuccess ? status : cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
}

template <class F>
auto with_products(const Shape& shape, Dtype dtype, F f) {
  if (dtype == Dtype::kHalf) return shape.head_dim == 64 ? f(Products<__half, 64>{}) : f(Products<__half, 128>{});
  return shape.head_dim == 64 ? f(Products<__nv_bfloat16, 64>{}) : f(Products<__nv_bfloat16, 128>{});
}

// Lays the arrays of the workspace out one after the other; counts only if there is none.
class Layout {
 public:
  explicit Layout(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class A>
  A* take(int64_t count) {
    A* array = memory_ == nullptr ? nullptr : reinterpret_cast<A*>(memory_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(A)) + 255) / 256 * 256;
    return array;
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  int64_t bytes_ = 0;
};

Workspace lay_out(Layout& layout, const Shape& shape, int64_t units_k, const BackwardPlan& plan, int processors) {
  const int64_t rows = units_k * heads_rows(shape), key_tiles = units_k * unit_tiles(shape);
  const bool sums = plan.reduce || plan.pass_tiles < block_tiles(shape);
  Workspace work;
  work.heads = static_cast<int32_t>(shape.heads_per_key_head());
  work.rows = heads_rows(shape);
  work.entries = capacity(shape);
  work.partial_rows = partial_rows(shape);
  work.block_tiles = static_cast<int32_t>(block_tiles(shape));
  work.unit_tiles = static_cast<int32_t>(unit_tiles(shape));
  work.pass_tiles = static_cast<int32_t>(plan.pass_tiles);
  work.lse = layout.take<float>(rows);
  work.own_lse = layout.take<float>(rows);
  work.delta = layout.take<float>(rows);
  work.sums = layout.take<float>(sums ? rows * shape.head_dim : 0);
  work.partials =
      layout.take<uint16_t>(plan.reduce ? 0 : units_k * partial_rows(shape) * plan.pass_tiles * shape.head_dim);
  work.items = layout.take<Item>(key_tiles + max_slabs(processors));
  work.splits = layout.take<Item>(key_tiles);
  work.slabs = layout.take<float>(max_slabs(processors) * 2 * kKeyTile * shape.head_dim);
  work.counters = layout.take<Counters>(1);
  return work;
}

}  // namespace

cudaError_t plan_backward(BackwardPlan& plan, const Shape& shape, int64_t units_k, bool deterministic, int64_t bytes) {
  int processors = 0;
  const cudaError_t status = processors_of_device(processors);
  if (status != cudaSuccess) return status;
  const int64_t tile_bytes = units_k * partial_rows(shape) * shape.head_dim * 2;
  const int64_t tiles = block_tiles(shape);
  plan.reduce =
      !deterministic && (heads_rows(shape) * shape.head_dim * 4 <= reduce_bytes(tiles) || tile_bytes * tiles > bytes);
  plan.pass_tiles = plan.reduce ? tiles : std::clamp(bytes / std::max<int64_t>(1, tile_bytes), int64_t(1), tiles);
  Layout layout(nullptr);
  lay_out(layout, shape, units_k, plan, processors);
  plan.bytes = layout.bytes();
  return cudaSuccess;
}

cudaError_t launch_backward(const BackwardParams& p, const BackwardPlan& plan, void* workspace, Dtype dtype,
                            cudaStream_t stream) {
  int processors = 0;
  cudaError_t status = processors_of_device(processors);
  if (status != cudaSuccess) return status;
  Layout layout(workspace);
  const Workspace work = lay_out(layout, p.shape, p.lists.units_k.count, plan, processors);
  const int64_t tiles = block_tiles(p.shape);
  for (int64_t tile = 0; tile < tiles && status == cudaSuccess; tile += plan.pass_tiles) {
    const int64_t count = std::min(plan.pass_tiles, tiles - tile);
    const Pass pass{static_cast<int32_t>(tile), static_cast<int32_t>(count), tile == 0, tile + count == tiles};
    status = launch_items(p, work, pass, processors, stream);
    if (status == cudaSuccess && pass.first) status = launch_prepare(p, work, plan.reduce, dtype, stream);
    if (status == cudaSuccess) {
      status = with_products(p.shape, dtype, [&](auto products) {
        return decltype(products)::launch(p, work, plan.reduce, processors, stream);
      });
    }
    if (status == cudaSuccess) status = launch_splits(p, work, processors, dtype, stream);
    if (status == cudaSuccess) status = launch_queries(p, work, pass, plan.reduce, dtype, stream);
  }
  if (status == cudaSuccess) status = launch_repair(p, work, processors, dtype, stream);
  return status;
}

}  // namespace moba::cuda::sm90
