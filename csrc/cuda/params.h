// Kernel arguments: plain structs, with a shape beside every pointer. Strides and offsets count elements.
#pragma once

#include <cstdint>

namespace moba::cuda {

constexpr int64_t kMaxHeadDim = 256;

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

// A tensor seen as [group, head, row, head_dim or slots]; the last dimension is contiguous.
struct Source {
  const void* data;
  int64_t group, head, row;
};
struct Target {
  void* data;
  int64_t group, head, row;
};

// The kernels work on units: one head of one batch entry or, in a packed batch, one head of all sequences.
// Unit u is head u % heads of group u / heads. Its rows are queries, its keys are keys; both are numbered through all
// sequences of the unit, and so are its blocks: see Sequence in portable/unit.cuh.
struct Shape {
  int64_t groups, heads, heads_k, head_dim;
  int64_t rows, keys;           // of one unit
  int64_t sequences;            // of one unit: 1 unless packed
  const int32_t* cu_seqlens_q;  // [sequences + 1] on the device, null unless packed
  const int32_t* cu_seqlens_k;
  int64_t block_size, slots;

  constexpr int64_t units() const { return groups * heads; }
  constexpr int64_t units_k() const { return groups * heads_k; }
  constexpr int64_t heads_per_key_head() const { return heads / heads_k; }
  // An upper bound that holds for every way to cut `keys` into `sequences`.
  constexpr int64_t blocks() const { return keys / block_size + sequences; }
  constexpr int64_t entries() const { return rows * slots; }
};

struct Range {
  int64_t begin, count;
};

struct MeansParams {
  Shape shape;
  Source k;
  void* means;  // [units_k, blocks, head_dim], dtype of k; only complete blocks are written
};

// A gate score with its block, ordered as the selection wants it.
constexpr int64_t kGateKeyBytes = 16;
// Up to this many candidates per row stay in shared memory (86 KiB in all for float64, where some devices have 99);
// more need GateParams::candidates.
constexpr int64_t kGateSharedCandidates = 16;
constexpr int64_t kGateRows = 64;

struct GateParams {
  Shape shape;
  Range units;
  Source q;
  const void* means;  // as in MeansParams
  void* candidates;   // [units.count, tiles(), slots - 1, kGateRows] of kGateKeyBytes, or null
  Target route;       // int32

  constexpr int64_t tiles() const { return shape.rows / kGateRows + shape.sequences; }
};

// For every block of every unit, the rows that chose it, in row order. An entry is row * slots + slot.
constexpr int64_t kListTile = 64;

struct Lists {
  Range units;          // what the arrays below cover
  int64_t chunks;       // each unit's rows are sorted in this many independent parts
  int32_t* choices;     // [units, rows, slots]: block of the unit, or -1: invalid or a duplicate
  int32_t* counts;      // [units, chunks, blocks]
  int64_t* list_begin;  // [units, blocks + 1]: first entry of each list
  int64_t* tile_begin;  // [units, blocks + 1]: the lists, counted in tiles of kListTile entries
  int64_t* entries;     // [units, rows * slots]
};

struct ListsParams {
  Shape shape;
  Source route;  // int32
  Lists lists;
};

struct AttendParams {
  Shape shape;
  Range units;  // within lists.units
  Lists lists;
  Source q, k, v;
  double softmax_scale;
  void* partial_out;  // [units.count, rows * slots, head_dim], float (double for double)
  void* partial_lse;  // [units.count, rows * slots]
};

struct MergeParams {
  Shape shape;
  Range units;
  Lists lists;
  const void* partial_out;
  const void* partial_lse;
  Target out;
  Target lse;  // row stride 1; float (double for double)
};

struct DeltaParams {
  Shape shape;
  Range units;
  Source dout, out, dlse;
  void* delta;  // [units.count, rows]: sum(dout * out) - dlse
};

struct BackwardKeysParams {
  Shape shape;
  Range units_k;  // their query heads are lists.units, which `delta` covers too
  Lists lists;
  Source q, k, v, dout, lse;
  const void* delta;
  double softmax_scale;
  Target dk, dv;
};

struct BackwardQueriesParams {
  Shape shape;
  Range units;  // within lists.units, which `delta` covers
  Lists lists;
  Source q, k, v, dout, lse;
  const void* delta;
  double softmax_scale;
  void* partial_dq;  // as AttendParams::partial_out
  Target dq;
};

}  // namespace moba::cuda
