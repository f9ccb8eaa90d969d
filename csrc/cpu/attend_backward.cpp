// Attention over a given routing on the CPU, backward: for each tile of keys, probabilities and score gradients of the
// queries that chose it, recomputed from lse. The tile's dk and dv are summed in place, dq is merged as in forward.
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "operators.h"
#include "pack.h"
#include "turns.h"
#include "vector_loops.h"

namespace moba::cpu {
namespace {

constexpr int64_t kScoreStride = kTileKeys + 16;

template <typename T, typename U, typename A>
struct BackwardScratch {
  explicit BackwardScratch(int64_t head_dim)
      : keys(head_dim),
        values(head_dim),
        key_rows(head_dim),
        queries(kPanelRows * units<U>(head_dim)),
        douts(kPanelRows * units<U>(head_dim)),
        query_terms(units<U>(kPanelRows) * head_dim),
        dout_terms(units<U>(kPanelRows) * head_dim),
        scores(kPanelRows * kScoreStride),
        dp(kPanelRows * kScoreStride),
        pairs(kTerms<U> == 1 ? 0 : 3 * kPanelRows * kScoreStride / 2),
        dq(kPanelRows * head_dim),
        dk(kTileKeys * head_dim),
        dv(kTileKeys * head_dim) {}
  TransposedTile<T, U> keys, values;
  RowTile<T, U> key_rows;
  Scratch<U> queries, douts, query_terms, dout_terms;
  Scratch<A> scores, dp;
  Scratch<U> pairs;
  Scratch<A> dq;      // of a panel
  Scratch<A> dk, dv;  // of the tile, over all queries of the task

  GradientOperands<U> operands() const {
    if constexpr (std::is_same_v<U, A>) {
      return {scores, dp, dp, kScoreStride, kScoreStride};
    } else {
      constexpr int64_t size = kPanelRows * kScoreStride / 2;
      return {pairs, pairs + size, pairs + 2 * size, kScoreStride, kScoreStride / 2};
    }
  }
};

template <typename T, typename U, typename A>
struct Backward {
  const Problem& problem;
  const Task& task;
  HeadRows<const T> q, dout;
  Rows<const T> k, v;
  HeadRows<const A> lse, delta;  // delta: dout . out - dlse
  A softmax_scale;
  HeadRows<A> dq;
  Rows<T> dk, dv;
  A* shared;  // sums of dk, then of dv, over the parts of the tile
  Turns& turns;
  BackwardScratch<T, U, A>& scratch;

  void run() {
    const int64_t head_dim = problem.head_dim;
    scratch.keys.load(k, task.key_begin, task.keys);
    scratch.values.load(v, task.key_begin, task.keys);
    scratch.key_rows.load(k, task.key_begin, task.keys);
    std::fill_n(static_cast<A*>(scratch.dk), task.keys * head_dim, A(0));
    std::fill_n(static_cast<A*>(scratch.dv), task.keys * head_dim, A(0));
    const bool finite = all_finite(k, task.key_begin, task.key_begin + task.keys, head_dim);
    for_each_panel(task, [&](const Panel& panel) {
      // Zeros, of masked places and of rows that see nothing, times something that is not finite would be NaN.
      if ((panel.diagonal && !(finite && finite_queries(panel))) || !all_see(panel)) {
        for_each_row(panel, [&](const Panel& row) {
          scratch.key_rows.load(k, row.key_begin, row.keys);
          if (sees(row.first())) add(row);
        });
        scratch.key_rows.load(k, task.key_begin, task.keys);
        turns.wait(task, panel.first(), panel.last());  // as add does, also for rows left out
      } else {
        add(panel);
      }
      turns.pass(task, panel.last());
    });
    store();
    turns.finish(task);
  }

  bool finite_queries(const Panel& panel) const {
    return std::all_of(panel.queries, panel.queries + panel.count, [&](Query query) {
      return all_finite(q(query.head, query.row), problem.head_dim) &&
             all_finite(dout(query.head, query.row), problem.head_dim);
    });
  }

  // lse = -inf: the row saw no key with a finite score.
  bool sees(Query query) const { return *lse(query.head, query.row) != -std::numeric_limits<A>::infinity(); }
  bool all_see(const Panel& panel) const {
    return std::all_of(panel.queries, panel.queries + panel.count, [&](Query query) { return sees(query); });
  }

  void add(const Panel& panel) {
    const int64_t head_dim = problem.head_dim;
    int64_t visible[kPanelRows];
    A row_lse[kPanelRows], row_delta[kPanelRows];
    for (int64_t i = 0; i < panel.count; ++i) {
      const auto [head, row] = panel.queries[i];
      row_lse[i] = *lse(head, row);
      row_delta[i] = *delta(head, row);
      visible[i] = panel.visible(i);
    }
    prefetch(panel.all(), dq, head_dim);
    prefetch(panel.next(task), q, head_dim);
    prefetch(panel.next(task), dout, head_dim);
    const Left<U> queries = gather(panel, q, head_dim, static_cast<U*>(scratch.queries));
    const Left<U> douts = gather(panel, dout, head_dim, static_cast<U*>(scratch.douts));
    const Right<U> query_terms = gather_terms(panel, q, head_dim, queries, static_cast<U*>(scratch.query_terms));
    const Right<U> dout_terms = gather_terms(panel, dout, head_dim, douts, static_cast<U*>(scratch.dout_terms));
    const Scores<A> scores{{scratch.scores, kScoreStride}, panel.count, panel.keys, visible};
    const Matrix<A> dp{scratch.dp, kScoreStride}, dq_panel{scratch.dq, head_dim};
    const int64_t rows = units<U>(panel.count);
    multiply(panel.count, panel.keys, units<U>(head_dim), softmax_scale, queries, scratch.keys, Into::kEmpty,
             scores.matrix);
    multiply(panel.count, panel.keys, units<U>(head_dim), A(1), douts, scratch.values, Into::kEmpty, dp);
    const GradientOperands<U> by = scratch.operands();
    to_gradients(scores, dp, row_lse, row_delta, softmax_scale, by);
    multiply(panel.keys, head_dim, rows, A(1), Left<U>{by.p, 1, by.stride}, dout_terms, Into::kSum,
             Matrix<A>{scratch.dv, head_dim});
    multiply(panel.keys, head_dim, rows, A(1), Left<U>{by.ds, 1, by.stride}, query_terms, Into::kSum,
             Matrix<A>{scratch.dk, head_dim});
    multiply(panel.count, head_dim, units<U>(panel.keys), A(1), Left<U>{by.ds_rows, by.rows_stride, 1},
             scratch.key_rows, Into::kEmpty, dq_panel);
    turns.wait(task, panel.first(), panel.last());
    for (int64_t i = 0; i < panel.count; ++i) {
      scale_and_add(dq(panel.queries[i].head, panel.queries[i].row), A(1), dq_panel[i], A(1), head_dim);
    }
  }

  // The sums of the task, or of all parts of the tile once the last one is done, become dk and dv of its keys.
  void store() {
    const int64_t size = task.keys * problem.head_dim;
    const A *from_dk = scratch.dk, *from_dv = scratch.dv;
    if (task.parts > 1) {
      A *all_dk = shared, *all_dv = shared + size;
      if (task.part > 0) turns.wait_for_predecessor(task);
      const A before = task.part > 0 ? 1 : 0;
      scale_and_add(all_dk, before, from_dk, A(1), size);
      scale_and_add(all_dv, before, from_dv, A(1), size);
      if (task.part + 1 < task.parts) return;
      from_dk = all_dk;
      from_dv = all_dv;
    }
    for (int64_t key = 0; key < task.keys; ++key) {
      convert(from_dk + key * problem.head_dim, dk[task.key_begin + key], problem.head_dim);
      convert(from_dv + key * problem.head_dim, dv[task.key_begin + key], problem.head_dim);
    }
  }

  static void convert(const A* from, T* to, int64_t count) {
    for (int64_t d = 0; d < count; ++d) to[d] = static_cast<T>(from[d]);
  }
};

template <typename T, typename U>
void backward_all(const Problem& problem, const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k,
                  const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& route, double softmax_scale,
                  const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  using A = Accumulated<U>;
  constexpr bool kDirect = std::is_same_v<T, A>;
  const int64_t head_dim = problem.head_dim;
  const RoutingLists lists(problem, route);
  const auto tasks = cut_into_tasks(problem, lists);
  Turns turns(problem, tasks);
  int64_t shared_tiles = 0;
  for (const Task& task : tasks) shared_tiles += task.parts > 1 && task.part == 0;
  const Tensor shared = at::zeros({shared_tiles, 2, std::min(kTileKeys, problem.block_size), head_dim}, lse.options());
  // dq of the accumulation type is its own accumulator.
  const Tensor dq_sums = kDirect ? dq : at::empty(problem.per_query_shape(q, head_dim), lse.options());
  dq_sums.zero_();
  const auto dq_of = [&](const Sequence& sequence) {
    return kDirect ? problem.queries_of<A>(dq_sums, sequence) : problem.per_query<A>(dq_sums, sequence, head_dim);
  };
  const Tensor delta = at::empty_like(lse);
  for_each_query(problem, [&](const Sequence& sequence, int64_t head, int64_t row) {
    const T* o = problem.queries_of<const T>(out, sequence)(head, row);
    const T* g = problem.queries_of<const T>(dout, sequence)(head, row);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < head_dim; ++d) sum += static_cast<A>(o[d]) * static_cast<A>(g[d]);
    *problem.per_query<A>(delta, sequence)(head, row) = sum - *problem.per_query<const A>(dlse, sequence)(head, row);
  });
  for_each_task(
      tasks.size(), [&] { return BackwardScratch<T, U, A>(head_dim); },
      [&](int64_t i, BackwardScratch<T, U, A>& scratch) {
        const Task& task = tasks[i];
        const Sequence& sequence = *task.sequence;
        Backward<T, U, A>{.problem = problem,
                          .task = task,
                          .q = problem.queries_of<const T>(q, sequence),
                          .dout = problem.queries_of<const T>(dout, sequence),
                          .k = problem.keys_of<const T>(k, sequence, task.head_k),
                          .v = problem.keys_of<const T>(v, sequence, task.head_k),
                          .lse = problem.per_query<const A>(lse, sequence),
                          .delta = problem.per_query<const A>(delta, sequence),
                          .softmax_scale = static_cast<A>(softmax_scale),
                          .dq = dq_of(sequence),
                          .dk = problem.keys_of<T>(dk, sequence, task.head_k),
                          .dv = problem.keys_of<T>(dv, sequence, task.head_k),
                          .shared = shared.data_ptr<A>() + task.shared * shared.stride(0),
                          .turns = turns,
                          .scratch = scratch}
            .run();
      });
  if constexpr (!kDirect) {
    for_each_query(problem, [&](const Sequence& sequence, int64_t head, int64_t row) {
      const A* from = dq_of(sequence)(head, row);
      T* to = problem.queries_of<T>(dq, sequence)(head, row);
      for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<T>(from[d]);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& dout_any, const Tensor& dlse_any, const Tensor& q_any,
                                                   const Tensor& k_any, const Tensor& v_any, const Tensor& out_any,
                                                   const Tensor& lse_any, const Tensor& route_any,
                                                   const OptionalTensor& cu_seqlens_q,
                                                   const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                   int64_t max_seqlen_k, int64_t block_size, double softmax_scale,
                                                   bool /*deterministic: always*/) {
  check_attend(q_any, k_any, v_any, route_any, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  check_backward(dout_any, dlse_any, q_any, out_any, lse_any, cu_seqlens_q.has_value());
  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any), v = with_contiguous_rows(v_any);
  const Tensor out = with_contiguous_rows(out_any), dout = with_contiguous_rows(dout_any);
  const Tensor lse = lse_any.contiguous(), dlse = dlse_any.contiguous();
  const Tensor route =
      with_slots(route_any, q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Problem problem = make_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Tensor dq = empty_rows_like(q), dk = empty_rows_like(k), dv = empty_rows_like(v);
  with_types(q.scalar_type(), [&](auto element, auto unit) {
    backward_all<decltype(element), decltype(unit)>(problem, dout, dlse, q, k, v, out, lse, route, softmax_scale, dq,
                                                    dk, dv);
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CPU, m) { m.impl("_attend_backward", &attend_backward); }

}  // namespace moba::cpu
