// How the work is cut. A task is a tile of keys with queries that see it; it takes its queries in panels of a few rows.
#pragma once

#include "lists.h"

namespace moba::cpu {

// So that a packed tile and the panel's scores stay in the second-level cache.
constexpr int64_t kPanelRows = 96, kTileKeys = 512;

// Keys [key_begin, key_begin + keys) of one block and head of k, and queries that chose the block and stand at or after
// key_begin. Cut by shapes and routing alone, never by the number of threads, so results do not depend on it.
struct Task {
  const Sequence* sequence;
  int64_t head_k, key_begin, keys;
  Queries queries;
  int64_t part, parts;   // a tile with very many queries is shared by several tasks
  int64_t shared;        // number of the tile among those, if it is one
  int64_t chain, place;  // all tasks of a sequence and head of k form a chain: see turns.h
};

// Queries that see the first `keys` keys from key_begin on, all of them unless the panel is diagonal.
struct Panel {
  const Query* queries;
  int64_t count;
  int64_t key_begin, keys;
  bool diagonal;
  const Sequence* sequence;

  // How many of the panel's keys query `i` of it may see.
  int64_t visible(int64_t i) const {
    return diagonal ? std::clamp<int64_t>(sequence->position(queries[i].row) + 1 - key_begin, 0, keys) : keys;
  }
  Query first() const { return queries[0]; }
  Query last() const { return queries[count - 1]; }
  Queries all() const { return {queries, queries + count}; }
  // About those of the panel that will be next.
  Queries next(const Task& task) const {
    return {queries + count, std::min(queries + count + kPanelRows, task.queries.end)};
  }
};

// Chains take turns in the list, so that threads meet in one chain only where there are more threads than chains. Tiles
// without queries are tasks too: someone has to write their gradients.
inline std::vector<Task> cut_into_tasks(const Problem& problem, const RoutingLists& lists) {
  const int64_t tiles_per_block = (problem.block_size + kTileKeys - 1) / kTileKeys;
  const int64_t most_queries = std::clamp<int64_t>(lists.size() * tiles_per_block / 64, 512, 4096);
  std::vector<Task> tasks;
  int64_t chain = 0, shared = 0;
  for (const Sequence& sequence : problem.sequences) {
    for (int64_t head_k = 0; head_k < problem.heads_k; ++head_k, ++chain) {
      int64_t place = 0;
      for (int64_t block = problem.blocks_of(sequence) - 1; block >= 0; --block) {
        const int64_t begin = block * problem.block_size, end = std::min(begin + problem.block_size, sequence.seqlen_k);
        for (int64_t tile = (end - begin - 1) / kTileKeys; tile >= 0; --tile) {
          const int64_t key_begin = begin + tile * kTileKeys;
          Queries all = lists.of(sequence, head_k, block);
          all.begin = std::partition_point(all.begin, all.end,
                                           [&](Query query) { return sequence.position(query.row) < key_begin; });
          const int64_t count = all.end - all.begin;
          const int64_t parts = std::max<int64_t>(1, (count + most_queries - 1) / most_queries);
          for (int64_t part = 0; part < parts; ++part) {
            tasks.push_back({.sequence = &sequence,
                             .head_k = head_k,
                             .key_begin = key_begin,
                             .keys = std::min(kTileKeys, end - key_begin),
                             .queries = {all.begin + count * part / parts, all.begin + count * (part + 1) / parts},
                             .part = part,
                             .parts = parts,
                             .shared = shared,
                             .chain = chain,
                             .place = place++});
          }
          shared += parts > 1;
        }
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.place < b.place; });
  return tasks;
}

// Calls body(panel) for panels of at most `rows` of the queries, which all stand within the panel's keys or all after.
template <typename Body>
void cut_into_panels(Panel panel, Queries queries, int64_t rows, const Body& body) {
  for (const Query* first = queries.begin; first < queries.end; first += rows) {
    Panel cut = panel;
    cut.queries = first;
    cut.count = std::min<int64_t>(rows, queries.end - first);
    cut.keys = cut.visible(cut.count - 1);
    body(cut);
  }
}

// Queries ascend, so those that stand within the tile come first.
template <typename Body>
void for_each_panel(const Task& task, const Body& body) {
  const Query* past = std::partition_point(task.queries.begin, task.queries.end, [&](Query query) {
    return task.sequence->position(query.row) < task.key_begin + task.keys;
  });
  Panel panel{.queries = nullptr,
              .count = 0,
              .key_begin = task.key_begin,
              .keys = task.keys,
              .diagonal = true,
              .sequence = task.sequence};
  cut_into_panels(panel, {task.queries.begin, past}, kPanelRows, body);
  panel.diagonal = false;
  cut_into_panels(panel, {past, task.queries.end}, kPanelRows, body);
}

// The same for the queries of a panel one by one, each with the keys that it sees.
template <typename Body>
void for_each_row(const Panel& panel, const Body& body) {
  cut_into_panels(panel, {panel.queries, panel.queries + panel.count}, 1, body);
}

}  // namespace moba::cpu
