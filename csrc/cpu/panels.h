// Turns a routing into matrix work: for each block, the queries of a task that chose it, in panels of rows that share a
// tile of keys.
#pragma once

#include <limits>

#include "linear_algebra.h"
#include "parallel.h"
#include "problem.h"

namespace moba::cpu {

// 128 queries x 512 keys: a panel of scores is 256 KiB in float32 and stays in the second-level cache.
constexpr int64_t kPanelRows = 128, kTileKeys = 512;

// Which queries of a task chose which block: a counting sort of the route, rows ascending within a block.
class RoutingLists {
 public:
  // `route` is anybody's: entries below 0 or after the row's own block are ignored, duplicates count once.
  void build(const Problem& problem, const Task& task, const int32_t* route, int64_t slots) {
    const Sequence& sequence = *task.sequence;
    const int64_t blocks = sequence.position(task.end - 1) / problem.block_size + 1;
    begin_.assign(blocks + 1, 0);
    visit(problem, task, route, slots, [&](int64_t, int32_t block) { ++begin_[block + 1]; });
    for (int64_t block = 0; block < blocks; ++block) begin_[block + 1] += begin_[block];
    rows_.resize(begin_[blocks]);
    next_.assign(begin_.begin(), begin_.end() - 1);
    visit(problem, task, route, slots, [&](int64_t row, int32_t block) { rows_[next_[block]++] = row; });
  }

  int64_t blocks() const { return static_cast<int64_t>(begin_.size()) - 1; }
  const int64_t* begin(int64_t block) const { return rows_.data() + begin_[block]; }
  const int64_t* end(int64_t block) const { return rows_.data() + begin_[block + 1]; }

 private:
  template <typename Visit>
  static void visit(const Problem& problem, const Task& task, const int32_t* route, int64_t slots,
                    const Visit& visit_entry) {
    for (int64_t row = task.begin; row < task.end; ++row) {
      const int32_t* entries = route + row * slots;
      const int64_t current = task.sequence->position(row) / problem.block_size;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int32_t block = entries[slot];
        if (block < 0 || block > current || std::find(entries, entries + slot, block) != entries + slot) continue;
        visit_entry(row, block);
      }
    }
  }

  std::vector<int64_t> begin_, rows_, next_;
};

// Queries that attend to keys [key_begin, key_begin + keys), all of them unless the panel is diagonal.
struct Panel {
  const int64_t* rows;  // query rows, ascending
  int64_t count;
  int64_t key_begin, keys;
  bool diagonal;
  const Sequence* sequence;

  // How many of the panel's keys row `i` of it may see.
  int64_t visible(int64_t i) const {
    return diagonal ? std::clamp<int64_t>(sequence->position(rows[i]) + 1 - key_begin, 0, keys) : keys;
  }
};

// Cuts [begin, end), rows that all see a tile fully or all stand in its block, into panels.
template <typename Body>
void cut_into_panels(Panel panel, const int64_t* begin, const int64_t* end, int64_t rows, const Body& body) {
  for (const int64_t* first = begin; first < end; first += rows) {
    Panel cut = panel;
    cut.rows = first;
    cut.count = std::min<int64_t>(rows, end - first);
    cut.keys = cut.visible(cut.count - 1);
    if (cut.keys > 0) body(cut);
  }
}

// Calls load(key_begin, keys) for each tile of keys that some query chose, then body(panel) for its panels. Tiles and
// rows ascend, so each query meets its keys in order.
template <typename Load, typename Body>
void for_each_panel(const Problem& problem, const Sequence& sequence, const RoutingLists& lists, const Load& load,
                    const Body& body) {
  for (int64_t block = 0; block < lists.blocks(); ++block) {
    const int64_t *begin = lists.begin(block), *end = lists.end(block);
    if (begin == end) continue;
    const int64_t block_begin = block * problem.block_size;
    const int64_t block_end = std::min(block_begin + problem.block_size, sequence.seqlen_k);
    // Rows ascend, so those that stand in the block come first.
    const int64_t* past = std::partition_point(
        begin, end, [&](int64_t row) { return sequence.position(row) < block_begin + problem.block_size; });
    for (int64_t key_begin = block_begin; key_begin < block_end; key_begin += kTileKeys) {
      const int64_t keys = std::min(kTileKeys, block_end - key_begin);
      load(key_begin, keys);
      const Panel panel{
          .rows = nullptr, .count = 0, .key_begin = key_begin, .keys = keys, .diagonal = false, .sequence = &sequence};
      Panel diagonal = panel;
      diagonal.diagonal = true;
      cut_into_panels(diagonal, begin, past, kPanelRows, body);
      cut_into_panels(panel, past, end, kPanelRows, body);
    }
  }
}

// A tile of keys or values in the accumulation type: in place where that is the tensor's own, else a copy.
template <typename T, typename A>
class Tile {
 public:
  explicit Tile(int64_t head_dim) : head_dim_(head_dim), copy_(kTileKeys * head_dim) {}

  void load(Rows<const T> rows, int64_t begin, int64_t count) {
    if constexpr (std::is_same_v<T, A>) {
      // BLAS takes no overlapping rows (an expanded tensor) and 32-bit strides only.
      if (rows.stride >= head_dim_ && rows.stride <= std::numeric_limits<int>::max()) {
        matrix_ = {rows[begin], rows.stride};
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) load_row(rows[begin + i], copy_ + i * head_dim_, head_dim_);
    matrix_ = {copy_, head_dim_};
  }
  Matrix<const A> matrix() const { return matrix_; }
  // Whether rows [begin, end) of the tile hold neither NaN nor infinity.
  bool finite(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (!all_finite(matrix_.data + i * matrix_.stride, head_dim_)) return false;
    }
    return true;
  }

 private:
  int64_t head_dim_;
  Scratch<A> copy_;
  Matrix<const A> matrix_{};
};

// The panel's rows of a tensor, one after the other.
template <typename T, typename A>
void gather(const Panel& panel, Rows<const T> from, int64_t head_dim, A* to) {
  for (int64_t i = 0; i < panel.count; ++i) load_row(from[panel.rows[i]], to + i * head_dim, head_dim);
}

}  // namespace moba::cpu
