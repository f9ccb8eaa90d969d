// Which queries belong to a key tile.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward/work.h"

namespace moba::cuda::sm90::backward {

// The last sequence whose key tiles begin at or before `tile`.
__device__ __forceinline__ Sequence sequence_of_tile(const Shape& shape, int64_t tile) {
  int64_t low = 0, high = shape.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (sequence_tiles(shape, boundary(shape.cu_seqlens_k, middle, shape.keys), middle) <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return sequence_at(shape, low);
}

// Key tile `index` with all its queries; keys == 0: a number that no block uses, or not of this pass. Fewer than 2^31
// tiles.
__device__ __forceinline__ Item key_tile(const BackwardParams& p, const Workspace& work, const Pass& pass,
                                         uint32_t index) {
  const Shape& shape = p.shape;
  const uint32_t blocks = static_cast<uint32_t>(shape.blocks()), tiles = work.block_tiles;
  const uint32_t unit_k = index / work.unit_tiles, in_unit = index % work.unit_tiles;
  Item item{};
  Block block;
  uint32_t number = in_unit / tiles, tile = in_unit % tiles;
  if (shape.cu_seqlens_k == nullptr) {
    const int64_t begin = number * shape.block_size;
    block = {{0, 0, shape.rows, 0, shape.keys}, begin, min(shape.block_size, shape.keys - begin)};
  } else {
    const Sequence sequence = sequence_of_tile(shape, in_unit);
    const int64_t own = in_unit - sequence_tiles(shape, sequence.key_begin, sequence.index);
    if (own < 0) return item;
    const int64_t begin = own / tiles * shape.block_size;
    number = static_cast<uint32_t>(first_part(sequence.key_begin, sequence.index, shape.block_size) + own / tiles);
    tile = static_cast<uint32_t>(own % tiles);
    block = {sequence, sequence.key_begin + begin, min(shape.block_size, sequence.keys - begin)};
  }
  const int64_t key = static_cast<int64_t>(tile) * kKeyTile;
  tile -= pass.tile_begin;
  if (tile >= static_cast<uint32_t>(pass.tiles) || key >= block.keys) return item;
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
