// Attention over a given routing on the CPU, forward: online softmax, one block of keys after the other, each over the
// gathered queries that chose it.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <limits>

#include "operators.h"
#include "panels.h"

namespace moba::cpu {
namespace {

template <typename T, typename A>
struct ForwardScratch {
  ForwardScratch(int64_t head_dim, int64_t rows)
      : keys(head_dim),
        values(head_dim),
        queries(kPanelRows * head_dim),
        scores(kPanelRows * kTileKeys),
        product(kPanelRows * head_dim),
        accumulated(rows * head_dim),
        maximum(rows),
        sum(rows) {}
  Tile<T, A> keys, values;
  Scratch<A> queries, scores, product;
  Scratch<A> accumulated, maximum, sum;  // one entry for each query of the task
  RoutingLists lists;
};

template <typename T, typename A>
struct Forward {
  const Problem& problem;
  const Task& task;
  Rows<const T> q, k, v;
  A softmax_scale;
  ForwardScratch<T, A>& scratch;

  void add(const Panel& panel) {
    // A future value times a zero probability would be NaN if the value is not finite: then one row at a time.
    if (panel.diagonal && panel.count > 1 && !scratch.values.finite(panel.visible(0), panel.keys)) {
      cut_into_panels(panel, panel.rows, panel.rows + panel.count, 1, [&](const Panel& row) { add(row); });
      return;
    }
    const int64_t head_dim = problem.head_dim;
    gather(panel, q, head_dim, static_cast<A*>(scratch.queries));
    multiply<A>(Transpose::kNo, Transpose::kYes, panel.count, panel.keys, head_dim, softmax_scale,
                {scratch.queries, head_dim}, scratch.keys.matrix(), 0, {scratch.scores, kTileKeys});
    A decay[kPanelRows];
    for (int64_t i = 0; i < panel.count; ++i) decay[i] = to_probabilities(panel, i);
    multiply<A>(Transpose::kNo, Transpose::kNo, panel.count, head_dim, panel.keys, 1, {scratch.scores, kTileKeys},
                scratch.values.matrix(), 0, {scratch.product, head_dim});
    for (int64_t i = 0; i < panel.count; ++i) {
      A* to = scratch.accumulated + (panel.rows[i] - task.begin) * head_dim;
      const A* from = scratch.product + i * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) to[d] = to[d] * decay[i] + from[d];
    }
  }

  // Row i of the scores becomes exp(score - maximum), 0 where masked; returns what earlier sums shrink by.
  A to_probabilities(const Panel& panel, int64_t i) {
    const int64_t row = panel.rows[i] - task.begin, visible = panel.visible(i);
    A* scores = scratch.scores + i * kTileKeys;
    const A before = scratch.maximum[row], now = std::max(before, largest(scores, visible));
    // A row whose maximum is -inf has no finite score yet, and (-inf) - (-inf) would be NaN.
    const A shift = now == -std::numeric_limits<A>::infinity() ? A(0) : now;
    const A decay = std::exp(before - shift);
    scratch.sum[row] = scratch.sum[row] * decay + exp_minus(scores, visible, shift);
    scratch.maximum[row] = now;
    std::fill(scores + visible, scores + panel.keys, A(0));
    return decay;
  }

  void run(const int32_t* route, int64_t slots, Rows<T> out, A* lse) {
    const int64_t head_dim = problem.head_dim, rows = task.end - task.begin;
    std::fill_n(static_cast<A*>(scratch.accumulated), rows * head_dim, A(0));
    std::fill_n(static_cast<A*>(scratch.maximum), rows, -std::numeric_limits<A>::infinity());
    std::fill_n(static_cast<A*>(scratch.sum), rows, A(0));
    scratch.lists.build(problem, task, route, slots);
    for_each_panel(
        problem, *task.sequence, scratch.lists,
        [&](int64_t begin, int64_t count) {
          scratch.keys.load(k, begin, count);
          scratch.values.load(v, begin, count);
        },
        [&](const Panel& panel) { add(panel); });
    for (int64_t row = 0; row < rows; ++row) {
      const A sum = scratch.sum[row];
      const A* from = scratch.accumulated + row * head_dim;
      T* to = out[task.begin + row];
      // Nothing seen: output 0, lse -inf.
      const A scale = sum == 0 ? A(0) : 1 / sum;
      for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<T>(from[d] * scale);
      lse[task.begin + row] = scratch.maximum[row] + std::log(sum);
    }
  }
};

// About 32 tasks for the whole call, so that any number of cores finds work, within bounds that keep panels full and
// the accumulators in cache.
int64_t rows_per_task(const Problem& problem) { return std::clamp<int64_t>(total_rows(problem) / 32, 256, 4096); }

std::tuple<Tensor, Tensor> attend(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                  const Tensor& route_any, const OptionalTensor& cu_seqlens_q,
                                  const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                  int64_t block_size, double softmax_scale, bool /*deterministic: always*/) {
  check_attend(q_any, k_any, v_any, route_any, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any), v = with_contiguous_rows(v_any);
  const Tensor route = with_slots(route_any, q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                  block_size);
  const Problem problem = make_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const int64_t slots = route.size(-1), rows = rows_per_task(problem);
  const Tensor out = at::empty_like(q);
  const auto shape = route.sizes();
  const Tensor lse = at::empty(shape.slice(0, shape.size() - 1), at::dtype(at::toOpMathType(q.scalar_type())));
  const auto tasks = cut_into_tasks(problem, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "moba::_attend", [&] {
    using T = scalar_t;
    using A = at::opmath_type<T>;
    for_each_task(
        tasks.size(), [&] { return ForwardScratch<T, A>(problem.head_dim, rows); },
        [&](int64_t i, ForwardScratch<T, A>& scratch) {
          const Task& task = tasks[i];
          const Sequence& sequence = *task.sequence;
          const int64_t head_k = task.head / problem.group();
          Forward<T, A> forward{.problem = problem,
                                .task = task,
                                .q = problem.rows<const T>(q, sequence, task.head, /*keys=*/false),
                                .k = problem.rows<const T>(k, sequence, head_k, /*keys=*/true),
                                .v = problem.rows<const T>(v, sequence, head_k, /*keys=*/true),
                                .softmax_scale = static_cast<A>(softmax_scale),
                                .scratch = scratch};
          forward.run(problem.per_query<const int32_t>(route, sequence, task.head, slots), slots,
                      problem.rows<T>(out, sequence, task.head, /*keys=*/false),
                      problem.per_query<A>(lse, sequence, task.head));
        });
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CPU, m) { m.impl("_attend", &attend); }

}  // namespace moba::cpu
