// Routing on the CPU: block means, then gate scores of 128 queries against 256 means at a time, of which each row keeps
// only its best. No gate tensor ever exists.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "linear_algebra.h"
#include "parallel.h"
#include "problem.h"

namespace moba::cpu {
namespace {

constexpr int64_t kRows = 128, kBlocks = 256;

// means [heads_k, blocks of all sequences, head_dim]; only complete blocks are ever read.
template <typename T, typename A>
Tensor block_means(const Problem& problem, const Tensor& k) {
  Tensor means =
      at::empty({problem.heads_k, problem.blocks, problem.head_dim},
                k.options().dtype(c10::CppTypeToScalarType<A>::value).memory_format(at::MemoryFormat::Contiguous));
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
    for (int64_t i = begin; i < end; ++i) {
      const auto [sequence, head, block] = blocks[i];
      const auto keys = problem.rows<const T>(k, *sequence, head, /*keys=*/true);
      A* mean = means.data_ptr<A>() + (head * problem.blocks + sequence->first_block + block) * problem.head_dim;
      std::fill_n(mean, problem.head_dim, A(0));
      for (int64_t row = block * problem.block_size; row < (block + 1) * problem.block_size; ++row) {
        const T* key = keys[row];
        for (int64_t d = 0; d < problem.head_dim; ++d) mean[d] += static_cast<A>(key[d]);
      }
      // Rounded to the dtype of k, as the authors' reference does: it decides about 3 % of bf16 rows.
      for (int64_t d = 0; d < problem.head_dim; ++d) {
        mean[d] = static_cast<A>(static_cast<T>(mean[d] / static_cast<A>(problem.block_size)));
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

template <typename A>
struct RouteScratch {
  RouteScratch(int64_t head_dim, int64_t slots)
      : queries(kRows * head_dim), gate(kRows * kBlocks), scores(kRows * slots) {}
  Scratch<A> queries, gate, scores;
};

template <typename T, typename A>
void route_rows(const Problem& problem, const Task& task, const Tensor& q, const Tensor& means, int64_t slots,
                const Tensor& route, RouteScratch<A>& scratch) {
  const Sequence& sequence = *task.sequence;
  const int64_t head_dim = problem.head_dim, rows = task.end - task.begin;
  const auto queries = problem.rows<const T>(q, sequence, task.head, /*keys=*/false);
  int32_t* chosen = problem.per_query<int32_t>(route, sequence, task.head, slots) + task.begin * slots;
  std::vector<Best<A>> best(rows);
  for (int64_t i = 0; i < rows; ++i) {
    load_row(queries[task.begin + i], scratch.queries + i * head_dim, head_dim);
    std::fill_n(chosen + i * slots, slots, -1);
    chosen[i * slots] = static_cast<int32_t>(sequence.position(task.begin + i) / problem.block_size);
    best[i] = {.scores = scratch.scores + i * slots, .blocks = chosen + i * slots + 1, .capacity = slots - 1};
  }
  const int64_t past = slots > 1 ? sequence.position(task.end - 1) / problem.block_size : 0;
  const A* mean =
      means.const_data_ptr<A>() + (task.head / problem.group() * problem.blocks + sequence.first_block) * head_dim;
  for (int64_t first = 0; first < past; first += kBlocks) {
    const int64_t count = std::min(kBlocks, past - first);
    multiply<A>(Transpose::kNo, Transpose::kYes, rows, count, head_dim, 1, {scratch.queries, head_dim},
                {mean + first * head_dim, head_dim}, 0, {scratch.gate, kBlocks});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t visible = std::min<int64_t>(count, chosen[i * slots] - first);
      best[i].offer_all(scratch.gate + i * kBlocks, visible, static_cast<int32_t>(first));
    }
  }
}

Tensor route(const Tensor& q_any, const Tensor& k_any, const OptionalTensor& cu_seqlens_q,
             const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t block_size,
             int64_t slots) {
  check_route(q_any, k_any, cu_seqlens_q, cu_seqlens_k, block_size, slots);
  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any);
  const Problem problem = make_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const auto options = at::TensorOptions().dtype(at::kInt);
  const Tensor route = problem.packed ? at::empty({q.size(1), q.size(0), slots}, options)
                                      : at::empty({q.size(0), q.size(1), q.size(2), slots}, options);
  const auto tasks = cut_into_tasks(problem, kRows);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "moba::_route", [&] {
    using A = at::opmath_type<scalar_t>;
    const Tensor means = block_means<scalar_t, A>(problem, k);
    for_each_task(
        tasks.size(), [&] { return RouteScratch<A>(problem.head_dim, slots); },
        [&](int64_t i, RouteScratch<A>& scratch) {
          route_rows<scalar_t, A>(problem, tasks[i], q, means, slots, route, scratch);
        });
  });
  return route;
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CPU, m) { m.impl("_route", &route); }

}  // namespace moba::cpu
