// Which queries belong to a key tile.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward/work.h"

namespace moba::cuda::sm90::backward {

// Key tile `index` of the pass with all its queries; keys == 0: a number that no block uses. Fewer than 2^31 tiles.
__device__ __forceinline__ Item key_tile(const BackwardParams& p, const Pass& pass, uint32_t index) {
  const Shape& shape = p.shape;
  const uint32_t blocks = static_cast<uint32_t>(shape.blocks()), tiles = pass.tiles;
  const uint32_t tile = index % tiles, unit_k = index / tiles / blocks, number = index / tiles % blocks;
  Block block;
  if (shape.cu_seqlens_k == nullptr) {
    const int64_t begin = number * shape.block_size;
    block = {{0, 0, shape.rows, 0, shape.keys}, begin, min(shape.block_size, shape.keys - begin)};
  } else {
    block = block_at(shape, number);
  }
  const int64_t key = (pass.tile_begin + tile) * kKeyTile;
  Item item{};
  if (key >= block.keys) return item;
  const Sequence& sequence = block.sequence;
  const int64_t position = block.key_begin - sequence.key_begin + key, first = sequence.keys - sequence.rows;
  const int64_t own = max(position, first), own_end = block.key_begin - sequence.key_begin + block.keys;
  const int32_t* list_begin = p.lists.list_begin + static_cast<int64_t>(unit_k) * (blocks + 1) + number;
  item.unit_k = static_cast<int32_t>(unit_k);
  item.key_begin = static_cast<int32_t>(block.key_begin + key);
  item.keys = static_cast<int32_t>(min(int64_t(kKeyTile), block.keys - key));
  item.tile = static_cast<int32_t>(tile);
  item.own_begin = static_cast<int32_t>(sequence.row_begin + own - first);
  item.own_rows = static_cast<int32_t>(max(own_end - own, int64_t(0)));
  item.own_shift = static_cast<int32_t>(own - position);
  item.list_begin = list_begin[0];
  item.list_end = list_begin[1];
  const int64_t own_tiles = (item.own_rows + kQueryTile - 1) / kQueryTile;
  item.count = static_cast<int32_t>(own_tiles * shape.heads_per_key_head() +
                                    (item.list_end - item.list_begin + kQueryTile - 1) / kQueryTile);
  return item;
}

}  // namespace moba::cuda::sm90::backward
