// Tensor maps: how TMA sees a tensor of 16-bit elements.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// What a Source covers: [groups, heads, rows, head_dim].
struct Extent {
  int64_t groups, heads, rows, head_dim;
};

// Whether rows start at 16 bytes and strides are such that a tensor map can hold them.
bool regular(const Source& source, const Extent& extent);

// A map for boxes of `box_rows` rows of one panel (64 columns), with the 128-byte swizzle; elements outside the extent
// arrive as zeros. Coordinates are (column, row, head, group). Expects a regular source.
cudaError_t make_tensor_map(CUtensorMap& map, const Source& source, const Extent& extent, int box_rows, Dtype dtype);

}  // namespace moba::cuda::sm90
