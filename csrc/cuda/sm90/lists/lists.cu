// Routing lists of past blocks by a counting sort in three launches: count, scan, place; of few rows in one launch.
#include <algorithm>

#include "cuda/sm90/launch.h"
#include "cuda/sm90/lists/list_cluster.cuh"
#include "cuda/sm90/lists/list_scan.cuh"
#include "cuda/sm90/lists/list_sort.cuh"

namespace moba::cuda::sm90 {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks that a part looks at in one go; the last one is the current block of the last rows, and in no list.
int window_of(const Shape& shape, int each) {
  return static_cast<int>(std::min<int64_t>(ceil_divide(shape.blocks(), 32) * 32, each * kSortThreads));
}

// Shared memory is asked for as much as any shape needs: another thread could lower a limit of this call's own before
// the launch.

template <bool kPlace, int kEach>
cudaError_t launch_sort(const PastListsParams& p, const Sort& sort, cudaStream_t stream) {
  const int64_t slots = p.shape.slots;
  const auto kernel = slots <= 4              ? sort_kernel<4, kPlace, kEach>
                      : slots <= kStagedSlots ? sort_kernel<kStagedSlots, kPlace, kEach>
                                              : sort_kernel<0, kPlace, kEach>;
  const bool staged = kPlace && slots <= kStagedSlots;
  const int bytes = Window::bytes(sort.window, staged), most = Window::bytes(kEach * kSortThreads, staged);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status != cudaSuccess) return status;
  const int64_t grid = p.lists.units_k.count * sort.chunks;
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(kernel, {static_cast<unsigned>(grid), kSortThreads, bytes}, stream, p, sort);
}

template <bool kPlace>
cudaError_t launch_sort(const PastListsParams& p, const Sort& sort, cudaStream_t stream) {
  return sort.window > kSortThreads ? launch_sort<kPlace, kMaxEach>(p, sort, stream)
                                    : launch_sort<kPlace, 1>(p, sort, stream);
}

// Parts of a head for one launch, or 0 if it is not for this shape.
int64_t cluster_parts(const Shape& shape) {
  const int64_t parts = ceil_divide(shape.rows, kClusterThreads);
  const bool fits = parts * shape.heads_per_key_head() <= kClusterCtas && shape.slots <= kStagedSlots &&
                    shape.blocks() <= kClusterBlocks;
  return fits ? parts : 0;
}

cudaError_t launch_cluster(const PastListsParams& p, int64_t parts, cudaStream_t stream) {
  const auto kernel = p.shape.slots <= 4 ? cluster_kernel<4> : cluster_kernel<kStagedSlots>;
  const int window = window_of(p.shape, 1);
  const int bytes = ClusterMemory::bytes(window), most = ClusterMemory::bytes(kClusterBlocks);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status != cudaSuccess) return status;
  const int64_t grid = p.lists.units_k.count * kClusterCtas;
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(kernel, {static_cast<unsigned>(grid), kClusterThreads, bytes, kClusterCtas}, stream, p,
                          static_cast<int>(parts), window);
}

}  // namespace

// Where there are thousands of blocks, chunks of several parts: else the counts would take more than the entries.
int64_t list_chunks(const Shape& shape) {
  const int64_t parts = ceil_divide(shape.rows, kSortThreads),
                together = std::max<int64_t>(1, shape.blocks() / kMaxWindow);
  return ceil_divide(parts, together) * shape.heads_per_key_head();
}

cudaError_t launch_past_lists(const PastListsParams& p, cudaStream_t stream) {
  if (const int64_t parts = cluster_parts(p.shape)) return launch_cluster(p, parts, stream);
  const int64_t per_head = p.lists.chunks / p.shape.heads_per_key_head();
  const Sort sort{
      .chunks = static_cast<int>(p.lists.chunks),
      .chunks_per_head = static_cast<int>(per_head),
      .chunk_rows = static_cast<int>(ceil_divide(ceil_divide(p.shape.rows, kSortThreads), per_head) * kSortThreads),
      .window = window_of(p.shape, p.shape.blocks() > kSortThreads + 1 ? kMaxEach : 1),
  };
  cudaError_t status = launch_sort<false>(p, sort, stream);
  if (status != cudaSuccess) return status;
  const unsigned scan_grid = static_cast<unsigned>(p.lists.units_k.count * kScanCtas);
  status = launch_dependent(scan_kernel, {scan_grid, kScanThreads, 0, kScanCtas}, stream, p, sort.chunks);
  return status == cudaSuccess ? launch_sort<true>(p, sort, stream) : status;
}

}  // namespace moba::cuda::sm90
