// In which order the tasks of a chain add to a query's sums. Floating-point sums depend on their order, and the order
// here is that of the chain, whatever the threads do.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <thread>

#include "tasks.h"

namespace moba::cpu {

// Each task takes its queries in ascending order, and adds to a query once all tasks before it in the chain are past
// that query or have none so late. A chain begins with the last tile of keys, whose own queries nobody can have added
// to; so its tasks run side by side, each a panel behind the one before. Tasks must be started in the order of the
// list, so that the first unfinished one never waits.
class Turns {
 public:
  Turns(const Problem& problem, const std::vector<Task>& tasks) : heads_(problem.heads) {
    begin_.assign(problem.sequences.size() * problem.heads_k + 1, 0);
    for (const Task& task : tasks) ++begin_[task.chain + 1];
    for (size_t chain = 1; chain < begin_.size(); ++chain) begin_[chain] += begin_[chain - 1];
    past_ = std::vector<std::atomic<int64_t>>(tasks.size());
    end_.assign(tasks.size(), 0);
    for (const Task& task : tasks) {
      const Queries& queries = task.queries;
      if (queries.begin < queries.end) end_[begin_[task.chain] + task.place] = number(queries.end[-1]) + 1;
    }
    finished_ = std::vector<std::atomic<int64_t>>(begin_.size());
  }

  // Returns once all tasks before this one are past those of their queries that are in [first, last].
  void wait(const Task& task, Query first, Query last) {
    std::atomic<int64_t>& finished = finished_[task.chain];
    int64_t place = finished.load(std::memory_order_acquire);
    const int64_t begin = number(first), end = number(last) + 1;
    for (bool all = true; place < task.place; ++place) {
      const int64_t other = begin_[task.chain] + place;
      const int64_t past = end_[other] <= begin ? past_[other].load(std::memory_order_acquire)
                                                : wait_until(other, std::min(end, end_[other]));
      all = all && past == kFinished;
      // A hint for later searches: threads may put it back a little, never too far ahead.
      if (all) finished.store(place + 1, std::memory_order_release);
    }
  }

  // Returns once the task before this one has finished.
  void wait_for_predecessor(const Task& task) { wait_until(begin_[task.chain] + task.place - 1, kFinished); }

  // The task will add nothing more to this query and those before it.
  void pass(const Task& task, Query query) { publish(task, number(query) + 1); }
  void finish(const Task& task) { publish(task, kFinished); }

 private:
  static constexpr int64_t kFinished = std::numeric_limits<int64_t>::max();

  int64_t number(Query query) const { return query.row * heads_ + query.head; }

  int64_t wait_until(int64_t task, int64_t wanted) const {
    // Longer than a panel takes: on a busy machine a thread that yields loses more than it waits for.
    constexpr int64_t kSpins = 20000;
    for (int64_t spins = 1;; ++spins) {
      const int64_t past = past_[task].load(std::memory_order_acquire);
      if (past >= wanted) return past;
      spins % kSpins == 0 ? std::this_thread::yield() : _mm_pause();
    }
  }

  void publish(const Task& task, int64_t past) {
    past_[begin_[task.chain] + task.place].store(past, std::memory_order_release);
  }

  int64_t heads_;
  std::vector<int64_t> begin_;              // of each chain in past_
  std::vector<std::atomic<int64_t>> past_;  // for each task, a number that it has passed
  std::vector<int64_t> end_;                // for each task, the number after its last query
  std::vector<std::atomic<int64_t>>
      finished_;  // for each chain, how many of its first tasks are known to have finished
};

}  // namespace moba::cpu
