// What the Hopper stages pass to each other: routing lists per key head, and partial results in the order of the lists.
#pragma once

#include <cstdint>

#include "cuda/params.h"

namespace moba::cuda::sm90 {

// An entry names a query of a key head: its head within the group above, its row below.
constexpr int kRowBits = 27;
constexpr int64_t kMaxRows = int64_t(1) << kRowBits;
constexpr int64_t kMaxGroup = int64_t(1) << (32 - kRowBits);

// What a slot of a route became: an index into the entries of its key head (0 and up) or one of these.
constexpr int32_t kUnused = -1;   // no block, or one that an earlier slot or the contract rules out
constexpr int32_t kCurrent = -2;  // the block that holds the query

// The past stage keeps the keys of a block of up to so many in shared memory. It streams larger ones past two tiles of
// queries at a time, and a visit to one tile takes as long: their lists are counted in whole pairs of tiles.
constexpr int64_t kMaxResident = 128;
constexpr int kStreamedTiles = 2;
constexpr int tiles_together(const Shape& shape) { return shape.block_size <= kMaxResident ? 1 : kStreamedTiles; }

// For every block of every key head, the queries of later blocks that chose it, ordered by head and row. The current
// block of a query is in no list: all its keys and queries are neighbours.
struct PastLists {
  Range units_k;        // the key heads (group * heads_k + head) that the arrays below cover
  int64_t chunks;       // each key head's queries are sorted in this many independent parts
  int32_t* counts;      // [units_k, chunks, blocks]; afterwards the first two hand out the work of the past stage
  int32_t* list_begin;  // [units_k, blocks + 1]: first entry of each list
  int32_t* tile_begin;  // [units_k, blocks + 1]: the lists in tiles of kListTile entries, see tiles_together
  uint32_t* entries;    // [units_k, capacity]
  int32_t* positions;   // [units_k, heads per key head, rows, slots]
};

// Entries of one key head, at most; fewer than 2^31.
constexpr int64_t capacity(const Shape& shape) { return shape.heads_per_key_head() * shape.entries(); }

struct PastListsParams {
  Shape shape;
  Source route;  // int32
  PastLists lists;
};

// One result per entry, in the order of the entries, so that a tile of a list is written in one piece.
struct Partials {
  // [units_k, capacity, head_dim], dtype of q. Columns are permuted within each 32 so that a thread's part of a product
  // is 16 bytes in one place: column 8 g + 2 j + e stands at 8 j + 2 g + e (g, j < 4; e < 2).
  void* out;
  float* lse;  // [units_k, capacity]: of the scaled scores, to base 2
};

// Attention of the listed queries to the blocks they chose.
struct PastParams {
  Shape shape;
  PastLists lists;
  Source q, k, v;
  double softmax_scale;
  Partials partials;
};

// Attention of every query to its current block, merged with its partials; or, with a route and without lists, to all
// blocks it chose.
struct CurrentParams {
  Shape shape;
  PastLists lists;
  Source q, k, v;
  double softmax_scale;
  Partials partials;
  Target out;
  Target lse;    // row stride 1, float, natural logarithm
  Source route;  // int32, or null
};

}  // namespace moba::cuda::sm90
