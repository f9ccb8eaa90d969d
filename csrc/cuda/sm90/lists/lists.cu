// Routing lists of past blocks by a counting sort in three launches: count, scan, place.
#include <algorithm>

#include "cuda/sm90/launch.h"
#include "cuda/sm90/lists/list_scan.cuh"
#include "cuda/sm90/lists/list_sort.cuh"

namespace moba::cuda::sm90 {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <bool kPlace>
cudaError_t launch_sort(const PastListsParams& p, const Sort& sort, cudaStream_t stream) {
  const int64_t slots = p.shape.slots;
  const auto kernel = slots <= 4              ? sort_kernel<4, kPlace>
                      : slots <= kStagedSlots ? sort_kernel<kStagedSlots, kPlace>
                                              : sort_kernel<0, kPlace>;
  const int bytes = Window::bytes(sort.window, kPlace && slots <= kStagedSlots);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t grid = p.lists.units_k.count * sort.chunks;
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(kernel, {static_cast<unsigned>(grid), kSortThreads, bytes}, stream, p, sort);
}

}  // namespace

// Where there are thousands of blocks, chunks of several parts: else the counts would take more than the entries.
int64_t list_chunks(const Shape& shape) {
  const int64_t parts = ceil_divide(shape.rows, kSortThreads),
                together = std::max<int64_t>(1, shape.blocks() / kSortThreads);
  return ceil_divide(parts, together) * shape.heads_per_key_head();
}

cudaError_t launch_past_lists(const PastListsParams& p, cudaStream_t stream) {
  const int64_t per_head = p.lists.chunks / p.shape.heads_per_key_head();
  const Sort sort{
      .chunks = static_cast<int>(p.lists.chunks),
      .chunks_per_head = static_cast<int>(per_head),
      .chunk_rows = static_cast<int>(ceil_divide(ceil_divide(p.shape.rows, kSortThreads), per_head) * kSortThreads),
      .window = static_cast<int>(std::min<int64_t>(ceil_divide(p.shape.blocks(), 32) * 32, kWindow)),
  };
  cudaError_t status = launch_sort<false>(p, sort, stream);
  if (status != cudaSuccess) return status;
  const unsigned scan_grid = static_cast<unsigned>(p.lists.units_k.count * kScanCtas);
  status = launch_dependent(scan_kernel, {scan_grid, kScanThreads, 0, kScanCtas}, stream, p, sort.chunks);
  return status == cudaSuccess ? launch_sort<true>(p, sort, stream) : status;
}

}  // namespace moba::cuda::sm90
