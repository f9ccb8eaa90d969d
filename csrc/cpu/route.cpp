// Routing on the CPU: block means, then gate scores of 128 queries against 256 means at a time, of which each row keeps
// only its best. No gate tensor ever exists.
#include <torch/library.h>

#include "avx512.h"
#include "pack.h"
#include "vector_loops.h"

namespace moba::cpu {
namespace {

constexpr int64_t kRows = 128, kBlocks = 256;

// Block means as right operands [head_dim, blocks of all sequences], one for each head of k. Only complete blocks are
// ever read.
template <typename U>
struct Means {
  Tensor memory;
  int64_t head_dim, blocks;
  Right<U> of(int64_t head, int64_t block) const {
    return {static_cast<const U*>(memory.const_data_ptr()) + head * units<U>(head_dim) * blocks + block, blocks};
  }
};

template <typename T, typename U>
Means<U> block_means(const Problem& problem, const Tensor& k) {
  using A = Accumulated<U>;
  const int64_t head_dim = problem.head_dim, bytes = problem.heads_k * units<U>(head_dim) * problem.blocks * sizeof(U);
  const Means<U> means{at::empty({bytes}, at::dtype(at::kByte)), head_dim, problem.blocks};
  struct Block {
    const Sequence* sequence;
    int64_t head, block;
  };
  std::vector<Block> blocks;
  for (const Sequence& sequence : problem.sequences) {
    for (int64_t head = 0; head < problem.heads_k; ++head) {
      for (int64_t block = 0; block < sequence.seqlen_k / problem.block_size; ++block) {
        blocks.push_back({&sequence, head, block});
      }
    }
  }
  at::parallel_for(0, blocks.size(), std::max<int64_t>(1, 4096 / problem.block_size), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(head_dim);
    std::vector<T> mean(head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const auto [sequence, head, block] = blocks[i];
      const auto keys = problem.keys_of<const T>(k, *sequence, head);
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t row = block * problem.block_size; row < (block + 1) * problem.block_size; ++row) {
        const T* key = keys[row];
        for (int64_t d = 0; d < head_dim; ++d) sum[d] += static_cast<A>(key[d]);
      }
      // Rounded to the dtype of k, as the authors' reference does: it decides about 3 % of bf16 rows.
      for (int64_t d = 0; d < head_dim; ++d) mean[d] = static_cast<T>(sum[d] / static_cast<A>(problem.block_size));
      const Right<U> column = means.of(head, sequence->first_block + block);
      for (int64_t unit = 0; unit < units<U>(head_dim); ++unit) {
        const_cast<U*>(column.data)[unit * column.stride] = unit_of<U>(mean.data(), unit, head_dim);
      }
    }
  });
  return means;
}

// The best `capacity` blocks of one row, best first. Blocks arrive in ascending order.
template <typename A>
struct Best {
  A* scores;
  int32_t* blocks;
  int64_t capacity, count = 0;

  // Whether a block that arrives later goes before one with score `other`: ties go to the later block, and NaN is
  // below every number.
  static bool precedes(A score, A other) { return score >= other || std::isnan(other); }

  // Scores of the blocks first, first + 1, ...: only those that can enter are looked at one by one.
  void offer_all(const A* offered, int64_t number, int32_t first) {
    if (capacity == 0) return;
    A bound = kth_bound(offered, number, capacity);
    if (count == capacity && scores[count - 1] > bound) bound = scores[count - 1];
    int32_t candidates[kBlocks];
    const int64_t found = find_reaching(offered, number, bound, candidates);
    for (int64_t i = 0; i < found; ++i) offer(offered[candidates[i]], first + candidates[i]);
  }

  void offer(A score, int32_t block) {
    if (count == capacity && (capacity == 0 || !precedes(score, scores[count - 1]))) return;
    int64_t at = count < capacity ? count++ : count - 1;
    for (; at > 0 && precedes(score, scores[at - 1]); --at) {
      scores[at] = scores[at - 1];
      blocks[at] = blocks[at - 1];
    }
    scores[at] = score;
    blocks[at] = block;
  }
};

// Where the machine can and all scores of a row are there.
bool select_at_once(const float* scores, int64_t count, int64_t wanted, int32_t* blocks) {
  return avx512::available() && avx512::best_of(scores, count, wanted, blocks);
}

bool select_at_once(const double*, int64_t, int64_t, int32_t*) { return false; }

template <typename U, typename A>
struct RouteScratch {
  RouteScratch(int64_t head_dim, int64_t slots)
      : queries(kRows * units<U>(head_dim)), gate(kRows * kBlocks), scores(kRows * slots), best(kRows) {}
  Scratch<U> queries;
  Scratch<A> gate, scores;
  std::vector<Best<A>> best;
};

// Some rows of one head.
struct RouteTask {
  const Sequence* sequence;
  int64_t head, begin, end;
};

template <typename T, typename U, typename A>
void route_rows(const Problem& problem, const RouteTask& task, const Tensor& q, const Means<U>& means, int64_t slots,
                const Tensor& route, RouteScratch<U, A>& scratch) {
  const Sequence& sequence = *task.sequence;
  const int64_t head_dim = problem.head_dim, rows = task.end - task.begin;
  const auto from = problem.queries_of<const T>(q, sequence);
  int32_t* chosen = problem.per_query<int32_t>(route, sequence, slots)(task.head, task.begin);
  const Left<U> queries{scratch.queries, units<U>(head_dim), 1};
  for (int64_t i = 0; i < rows; ++i) {
    load_row(from(task.head, task.begin + i), scratch.queries + i * queries.row_stride, head_dim);
    std::fill_n(chosen + i * slots, slots, -1);
    chosen[i * slots] = static_cast<int32_t>(sequence.position(task.begin + i) / problem.block_size);
    scratch.best[i] = {.scores = scratch.scores + i * slots, .blocks = chosen + i * slots + 1, .capacity = slots - 1};
  }
  const int64_t past = slots > 1 ? sequence.position(task.end - 1) / problem.block_size : 0;
  for (int64_t first = 0; first < past; first += kBlocks) {
    const int64_t count = std::min(kBlocks, past - first);
    multiply(rows, count, units<U>(head_dim), A(1), queries,
             means.of(task.head / problem.group(), sequence.first_block + first), Into::kEmpty,
             Matrix<A>{scratch.gate, kBlocks});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t visible = std::min<int64_t>(count, chosen[i * slots] - first);
      const A* gate = scratch.gate + i * kBlocks;
      if (past <= kBlocks && select_at_once(gate, visible, slots - 1, chosen + i * slots + 1)) continue;
      scratch.best[i].offer_all(gate, visible, static_cast<int32_t>(first));
    }
  }
}

Tensor route(const Tensor& q_any, const Tensor& k_any, const OptionalTensor& cu_seqlens_q,
             const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t block_size,
             int64_t slots) {
  check_route(q_any, k_any, cu_seqlens_q, cu_seqlens_k, block_size, slots);
  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any);
  const Problem problem = make_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Tensor route = at::empty(problem.per_query_shape(q, slots), at::dtype(at::kInt));
  std::vector<RouteTask> tasks;
  for (const Sequence& sequence : problem.sequences) {
    for (int64_t head = 0; head < problem.heads; ++head) {
      for (int64_t begin = 0; begin < sequence.seqlen_q; begin += kRows) {
        tasks.push_back({&sequence, head, begin, std::min(begin + kRows, sequence.seqlen_q)});
      }
    }
  }
  with_types(q.scalar_type(), [&](auto element, auto unit) {
    using T = decltype(element);
    using U = decltype(unit);
    using A = Accumulated<U>;
    const Means<U> means = block_means<T, U>(problem, k);
    for_each_task(
        tasks.size(), [&] { return RouteScratch<U, A>(problem.head_dim, slots); },
        [&](int64_t i, RouteScratch<U, A>& scratch) {
          route_rows<T, U, A>(problem, tasks[i], q, means, slots, route, scratch);
        });
  });
  return route;
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CPU, m) { m.impl("_route", &route); }

}  // namespace moba::cpu
