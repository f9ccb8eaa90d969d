// Attention over a given routing on the CPU, forward: for each tile of keys, scores, softmax and output of the queries
// that chose it, merged into what the queries have from other tiles.
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <cmath>

#include "operators.h"
#include "pack.h"
#include "turns.h"
#include "vector_loops.h"

namespace moba::cpu {
namespace {

constexpr int64_t kScoreStride = kTileKeys + 16;

template <typename T, typename U, typename A>
struct ForwardScratch {
  explicit ForwardScratch(int64_t head_dim)
      : keys(head_dim),
        values(head_dim),
        queries(kPanelRows * units<U>(head_dim)),
        scores(kPanelRows * kScoreStride),
        pairs(kTerms<U> == 1 ? 0 : kPanelRows * kScoreStride),
        output(kPanelRows * head_dim) {}
  TransposedTile<T, U> keys;
  RowTile<T, U> values;
  Scratch<U> queries;
  Scratch<A> scores;
  Scratch<U> pairs;
  Scratch<A> output;
  // Probabilities: units of one number take the place of the scores.
  U* probabilities() const {
    if constexpr (std::is_same_v<U, A>) return scores;
    return pairs;
  }
};

// What a query has from the tiles that it met so far: the numerator and denominator of its softmax, both over
// exp(maximum).
template <typename A>
struct Sums {
  HeadRows<A> output, maximum, sum;
};

template <typename T, typename U, typename A>
struct Forward {
  const Problem& problem;
  const Task& task;
  HeadRows<const T> q;
  Rows<const T> k, v;
  A softmax_scale;
  Sums<A> sums;
  Turns& turns;
  ForwardScratch<T, U, A>& scratch;

  void run() {
    if (task.queries.begin == task.queries.end) return turns.finish(task);
    scratch.keys.load(k, task.key_begin, task.keys);
    scratch.values.load(v, task.key_begin, task.keys);
    const bool finite = all_finite(v, task.key_begin, task.key_begin + task.keys, problem.head_dim);
    for_each_panel(task, [&](const Panel& panel) {
      // A masked value has probability 0, and 0 times an infinity would be NaN.
      if (panel.diagonal && !finite) {
        for_each_row(panel, [&](const Panel& row) {
          scratch.values.load(v, row.key_begin, row.keys);
          add(row);
        });
        scratch.values.load(v, task.key_begin, task.keys);
      } else {
        add(panel);
      }
      turns.pass(task, panel.last());
    });
    turns.finish(task);
  }

  void add(const Panel& panel) {
    const int64_t head_dim = problem.head_dim;
    int64_t visible[kPanelRows];
    for (int64_t i = 0; i < panel.count; ++i) visible[i] = panel.visible(i);
    prefetch(panel.all(), sums.output, head_dim);
    prefetch(panel.next(task), q, head_dim);
    const Left<U> queries = gather(panel, q, head_dim, static_cast<U*>(scratch.queries));
    const Scores<A> scores{{scratch.scores, kScoreStride}, panel.count, panel.keys, visible};
    multiply(panel.count, panel.keys, units<U>(head_dim), softmax_scale, queries, scratch.keys, Into::kEmpty,
             scores.matrix);
    A maximum[kPanelRows], sum[kPanelRows];
    constexpr int64_t stride = kScoreStride / kTerms<U>;
    to_probabilities(scores, maximum, sum, scratch.probabilities(), stride);
    const Matrix<A> output{scratch.output, head_dim};
    multiply(panel.count, head_dim, units<U>(panel.keys), A(1), Left<U>{scratch.probabilities(), stride, 1},
             scratch.values, Into::kEmpty, output);
    turns.wait(task, panel.first(), panel.last());
    for (int64_t i = 0; i < panel.count; ++i) merge(panel.queries[i], maximum[i], sum[i], output[i]);
  }

  void merge(Query query, A maximum, A sum, const A* output) {
    A& maximum_before = *sums.maximum(query.head, query.row);
    A& total = *sums.sum(query.head, query.row);
    const A now = std::max(maximum_before, maximum);
    // (-inf) - (-inf) would be NaN.
    const A shift = now == -std::numeric_limits<A>::infinity() ? A(0) : now;
    const A before = std::exp(maximum_before - shift), added = std::exp(maximum - shift);
    total = total * before + sum * added;
    maximum_before = now;
    scale_and_add(sums.output(query.head, query.row), before, output, added, problem.head_dim);
  }
};

template <typename T, typename U>
void attend_all(const Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& route,
                double softmax_scale, const Tensor& out, const Tensor& lse) {
  using A = Accumulated<U>;
  const RoutingLists lists(problem, route);
  const auto tasks = cut_into_tasks(problem, lists);
  Turns turns(problem, tasks);
  // Outputs of the accumulation type are their own accumulators, and lse holds the maxima.
  const Tensor output =
      std::is_same_v<T, A> ? out : at::empty(problem.per_query_shape(q, problem.head_dim), lse.options());
  const Tensor sum = at::zeros_like(lse);
  output.zero_();
  lse.fill_(-std::numeric_limits<A>::infinity());
  const auto sums_of = [&](const Sequence& sequence) -> Sums<A> {
    return {std::is_same_v<T, A> ? problem.queries_of<A>(output, sequence)
                                 : problem.per_query<A>(output, sequence, problem.head_dim),
            problem.per_query<A>(lse, sequence), problem.per_query<A>(sum, sequence)};
  };
  for_each_task(
      tasks.size(), [&] { return ForwardScratch<T, U, A>(problem.head_dim); },
      [&](int64_t i, ForwardScratch<T, U, A>& scratch) {
        const Task& task = tasks[i];
        Forward<T, U, A>{.problem = problem,
                         .task = task,
                         .q = problem.queries_of<const T>(q, *task.sequence),
                         .k = problem.keys_of<const T>(k, *task.sequence, task.head_k),
                         .v = problem.keys_of<const T>(v, *task.sequence, task.head_k),
                         .softmax_scale = static_cast<A>(softmax_scale),
                         .sums = sums_of(*task.sequence),
                         .turns = turns,
                         .scratch = scratch}
            .run();
      });
  for_each_query(problem, [&](const Sequence& sequence, int64_t head, int64_t row) {
    const Sums<A> sums = sums_of(sequence);
    const A total = *sums.sum(head, row);
    const A* from = sums.output(head, row);
    T* to = problem.queries_of<T>(out, sequence)(head, row);
    // Nothing seen: output 0, lse -inf.
    const A scale = total == 0 ? A(0) : 1 / total;
    for (int64_t d = 0; d < problem.head_dim; ++d) to[d] = static_cast<T>(from[d] * scale);
    *sums.maximum(head, row) += std::log(total);
  });
}

std::tuple<Tensor, Tensor> attend(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                  const Tensor& route_any, const OptionalTensor& cu_seqlens_q,
                                  const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                  int64_t block_size, double softmax_scale, bool /*deterministic: always*/) {
  check_attend(q_any, k_any, v_any, route_any, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any), v = with_contiguous_rows(v_any);
  const Tensor route =
      with_slots(route_any, q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Problem problem = make_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Tensor out = empty_rows_like(q);
  const Tensor lse = at::empty(problem.per_query_shape(q), at::dtype(at::toOpMathType(q.scalar_type())));
  with_types(q.scalar_type(), [&](auto element, auto unit) {
    attend_all<decltype(element), decltype(unit)>(problem, q, k, v, route, softmax_scale, out, lse);
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CPU, m) { m.impl("_attend", &attend); }

}  // namespace moba::cpu
