// Which queries chose which block: the routing, sorted by block.
#pragma once

#include <utility>

#include "problem.h"

namespace moba::cpu {

struct Query {
  int32_t head, row;
};

struct Queries {
  const Query *begin, *end;
};

// For each sequence, head of k and block, the queries of its group of heads, by row and then by head. A counting sort
// over slices of rows, so that one long sequence keeps all threads busy.
class RoutingLists {
 public:
  // `route` is anybody's: entries below 0 or after the row's own block are ignored, duplicates count once.
  RoutingLists(const Problem& problem, const Tensor& route) : problem_(problem), begin_{0} {
    std::vector<Slice> slices = cut_into_slices();
    const auto visit_all = [&](const auto& visit_entry) {
      at::parallel_for(0, slices.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) visit(route, slices[i], visit_entry);
      });
    };
    visit_all([](Slice& slice, Query, int32_t block) { ++slice.counts[block]; });
    // Each count becomes the place of the slice's first entry.
    int64_t total = 0;
    for (size_t first = 0; first < slices.size(); first += slices[first].of_head) {
      for (int64_t block = 0; block < problem.blocks_of(*slices[first].sequence); ++block) {
        for (size_t i = first; i < first + slices[first].of_head; ++i) {
          total += std::exchange(slices[i].counts[block], total);
        }
        begin_.push_back(total);
      }
    }
    queries_.resize(total);
    visit_all([&](Slice& slice, Query query, int32_t block) { queries_[slice.counts[block]++] = query; });
  }

  Queries of(const Sequence& sequence, int64_t head_k, int64_t block) const {
    const int64_t* begin =
        &begin_[sequence.first_block * problem_.heads_k + head_k * problem_.blocks_of(sequence) + block];
    return {queries_.data() + begin[0], queries_.data() + begin[1]};
  }

  int64_t size() const { return static_cast<int64_t>(queries_.size()); }

 private:
  struct Slice {
    const Sequence* sequence;
    int64_t head_k, begin, end;   // query rows
    size_t of_head;               // how many slices this head of k has
    std::vector<int64_t> counts;  // for each block
  };

  std::vector<Slice> cut_into_slices() const {
    constexpr int64_t kRows = 1024, kMost = 16;
    std::vector<Slice> slices;
    for (const Sequence& sequence : problem_.sequences) {
      const int64_t count = std::clamp<int64_t>(sequence.seqlen_q / kRows, 1, kMost);
      for (int64_t head_k = 0; head_k < problem_.heads_k; ++head_k) {
        for (int64_t i = 0; i < count; ++i) {
          slices.push_back({&sequence, head_k, sequence.seqlen_q * i / count, sequence.seqlen_q * (i + 1) / count,
                            static_cast<size_t>(count), std::vector<int64_t>(problem_.blocks_of(sequence))});
        }
      }
    }
    return slices;
  }

  template <typename Visit>
  void visit(const Tensor& route, Slice& slice, const Visit& visit_entry) const {
    const int64_t slots = route.size(-1), group = problem_.group();
    const auto entries_of = problem_.per_query<const int32_t>(route, *slice.sequence, slots);
    for (int64_t row = slice.begin; row < slice.end; ++row) {
      const int64_t current = slice.sequence->position(row) / problem_.block_size;
      for (int64_t head = slice.head_k * group; head < (slice.head_k + 1) * group; ++head) {
        const int32_t* entries = entries_of(head, row);
        for (int64_t slot = 0; slot < slots; ++slot) {
          const int32_t block = entries[slot];
          if (block < 0 || block > current || std::find(entries, entries + slot, block) != entries + slot) continue;
          visit_entry(slice, Query{static_cast<int32_t>(head), static_cast<int32_t>(row)}, block);
        }
      }
    }
  }

  const Problem& problem_;
  std::vector<int64_t> begin_;
  std::vector<Query> queries_;
};

}  // namespace moba::cpu
