// Attention over a given routing on the CPU, backward. Probabilities are recomputed from lse, block by block, over the
// same gathered panels as forward. A task owns its rows of dq and adds into a dk and dv of its own; where several tasks
// share keys, their sums are added in a fixed order. So the result never depends on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <limits>

#include "operators.h"
#include "panels.h"

namespace moba::cpu {
namespace {

template <typename T, typename A>
struct BackwardScratch {
  BackwardScratch(int64_t head_dim, int64_t rows)
      : keys(head_dim),
        values(head_dim),
        queries(kPanelRows * head_dim),
        douts(kPanelRows * head_dim),
        probabilities(kPanelRows * kTileKeys),
        gradients(kPanelRows * kTileKeys),
        product(kPanelRows * head_dim),
        dq(rows * head_dim),
        delta(rows) {}
  Tile<T, A> keys, values;
  Scratch<A> queries, douts, probabilities, gradients, product;
  Scratch<A> dq, delta;  // one entry for each query of the task
  RoutingLists lists;
};

template <typename T, typename A>
struct Backward {
  const Problem& problem;
  const Task& task;
  Rows<const T> q, k, v, out, dout;
  const A *lse, *dlse;
  A softmax_scale;
  Matrix<A> dk, dv;  // sums over the task's queries, one row for each key of the sequence
  BackwardScratch<T, A>& scratch;

  void add(const Panel& panel) {
    const int64_t head_dim = problem.head_dim;
    gather(panel, q, head_dim, static_cast<A*>(scratch.queries));
    gather(panel, dout, head_dim, static_cast<A*>(scratch.douts));
    // Zeros at masked places times something that is not finite would be NaN: then one row at a time.
    if (panel.diagonal && panel.count > 1 && !finite(panel)) {
      cut_into_panels(panel, panel.rows, panel.rows + panel.count, 1, [&](const Panel& row) { add(row); });
      return;
    }
    const Matrix<const A> queries{scratch.queries, head_dim}, douts{scratch.douts, head_dim};
    const Matrix<A> p{scratch.probabilities, kTileKeys}, ds{scratch.gradients, kTileKeys};
    const Matrix<const A> p_in{p.data, p.stride}, ds_in{ds.data, ds.stride};
    multiply<A>(Transpose::kNo, Transpose::kYes, panel.count, panel.keys, head_dim, softmax_scale, queries,
                scratch.keys.matrix(), 0, p);
    multiply<A>(Transpose::kNo, Transpose::kYes, panel.count, panel.keys, head_dim, 1, douts, scratch.values.matrix(),
                0, ds);
    for (int64_t i = 0; i < panel.count; ++i) to_gradients(panel, i);
    const Matrix<A> dk_tile{dk.data + panel.key_begin * dk.stride, dk.stride};
    const Matrix<A> dv_tile{dv.data + panel.key_begin * dv.stride, dv.stride};
    multiply<A>(Transpose::kYes, Transpose::kNo, panel.keys, head_dim, panel.count, 1, p_in, douts, 1, dv_tile);
    multiply<A>(Transpose::kYes, Transpose::kNo, panel.keys, head_dim, panel.count, 1, ds_in, queries, 1, dk_tile);
    multiply<A>(Transpose::kNo, Transpose::kNo, panel.count, head_dim, panel.keys, 1, ds_in, scratch.keys.matrix(), 0,
                {scratch.product, head_dim});
    for (int64_t i = 0; i < panel.count; ++i) {
      A* to = scratch.dq + (panel.rows[i] - task.begin) * head_dim;
      const A* from = scratch.product + i * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) to[d] += from[d];
    }
  }

  bool finite(const Panel& panel) const {
    return scratch.keys.finite(panel.visible(0), panel.keys) &&
           all_finite<A>(scratch.queries, panel.count * problem.head_dim) &&
           all_finite<A>(scratch.douts, panel.count * problem.head_dim);
  }

  // Row i: scores become probabilities, dout . v becomes the gradient of the unscaled score; 0 where masked.
  void to_gradients(const Panel& panel, int64_t i) {
    const int64_t row = panel.rows[i];
    A* p = scratch.probabilities + i * kTileKeys;
    A* ds = scratch.gradients + i * kTileKeys;
    // lse = -inf: the row saw no key with a finite score.
    const int64_t visible = lse[row] == -std::numeric_limits<A>::infinity() ? 0 : panel.visible(i);
    exp_minus(p, visible, lse[row]);
    softmax_gradient(p, ds, visible, scratch.delta[row - task.begin], softmax_scale);
    std::fill(p + visible, p + panel.keys, A(0));
    std::fill(ds + visible, ds + panel.keys, A(0));
  }

  void run(const int32_t* route, int64_t slots, Rows<T> dq) {
    const int64_t head_dim = problem.head_dim, rows = task.end - task.begin;
    for (int64_t row = 0; row < rows; ++row) {
      const T *o = out[task.begin + row], *g = dout[task.begin + row];
      A delta = -dlse[task.begin + row];
      for (int64_t d = 0; d < head_dim; ++d) delta += static_cast<A>(o[d]) * static_cast<A>(g[d]);
      scratch.delta[row] = delta;
    }
    std::fill_n(static_cast<A*>(scratch.dq), rows * head_dim, A(0));
    scratch.lists.build(problem, task, route, slots);
    for_each_panel(
        problem, *task.sequence, scratch.lists,
        [&](int64_t begin, int64_t count) {
          scratch.keys.load(k, begin, count);
          scratch.values.load(v, begin, count);
        },
        [&](const Panel& panel) { add(panel); });
    for (int64_t row = 0; row < rows; ++row) {
      const A* from = scratch.dq + row * head_dim;
      T* to = dq[task.begin + row];
      for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<T>(from[d]);
    }
  }
};

int64_t longest_sequence(const Problem& problem) {
  int64_t longest = 0;
  for (const Sequence& sequence : problem.sequences) longest = std::max(longest, sequence.seqlen_q);
  return longest;
}

// Rows of queries that one task takes for all query heads of a key head. At least 8 tasks for the whole call where
// sequences are long; each further split of a sequence costs one more copy of dk and dv.
int64_t splits_per_sequence(const Problem& problem) {
  const int64_t units = std::max<int64_t>(1, problem.sequences.size() * problem.heads_k);
  return std::clamp<int64_t>(8 / units, 1, std::max<int64_t>(1, longest_sequence(problem) / 1024));
}

// Sums over splits, in order, into the tensor's dtype and strides. partial [splits, heads_k, keys, head_dim].
template <typename T, typename A>
void add_splits(const Problem& problem, const Tensor& partial, const Tensor& total) {
  const int64_t head_dim = problem.head_dim, keys = partial.size(2), splits = partial.size(0);
  const A* from = partial.const_data_ptr<A>();
  for (const Sequence& sequence : problem.sequences) {
    at::parallel_for(0, problem.heads_k * sequence.seqlen_k, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / sequence.seqlen_k, key = i % sequence.seqlen_k;
        T* to = problem.rows<T>(total, sequence, head, /*keys=*/true)[key];
        for (int64_t d = 0; d < head_dim; ++d) {
          A sum = 0;
          for (int64_t split = 0; split < splits; ++split) {
            sum += from[((split * problem.heads_k + head) * keys + sequence.first_key + key) * head_dim + d];
          }
          to[d] = static_cast<T>(sum);
        }
      }
    });
  }
}

template <typename T>
void run_all(const Problem& problem, const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k,
             const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& route, double softmax_scale,
             const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  using A = at::opmath_type<T>;
  const int64_t head_dim = problem.head_dim, slots = route.size(-1), splits = splits_per_sequence(problem);
  const int64_t keys = problem.keys, rows = (longest_sequence(problem) + splits - 1) / splits;
  // One split in the accumulation type needs no copy: it adds into the gradients themselves.
  const bool direct = splits == 1 && std::is_same_v<T, A>;
  const auto options = at::dtype(c10::CppTypeToScalarType<A>::value);
  const std::vector<int64_t> shape = {splits, problem.heads_k, direct ? 0 : keys, head_dim};
  const Tensor partial_dk = at::zeros(shape, options), partial_dv = at::zeros(shape, options);
  if (direct) {
    dk.zero_();
    dv.zero_();
  }
  const auto target = [&](const Tensor& total, const Tensor& partial, const Sequence& sequence, int64_t head,
                          int64_t split) -> Matrix<A> {
    if (direct) {
      const auto whole = problem.rows<A>(total, sequence, head, /*keys=*/true);
      return {whole.data, whole.stride};
    }
    return {partial.data_ptr<A>() + ((split * problem.heads_k + head) * keys + sequence.first_key) * head_dim,
            head_dim};
  };
  struct Unit {
    const Sequence* sequence;
    int64_t head_k, split;
  };
  std::vector<Unit> units;
  for (const Sequence& sequence : problem.sequences) {
    for (int64_t head = 0; head < problem.heads_k; ++head) {
      for (int64_t split = 0; split * rows < sequence.seqlen_q; ++split) units.push_back({&sequence, head, split});
    }
  }
  for_each_task(
      units.size(), [&] { return BackwardScratch<T, A>(head_dim, rows); },
      [&](int64_t i, BackwardScratch<T, A>& scratch) {
        const auto [sequence, head_k, split] = units[i];
        for (int64_t head = head_k * problem.group(); head < (head_k + 1) * problem.group(); ++head) {
          const Task task{sequence, head, split * rows, std::min((split + 1) * rows, sequence->seqlen_q)};
          Backward<T, A> backward{.problem = problem,
                                  .task = task,
                                  .q = problem.rows<const T>(q, *sequence, head, /*keys=*/false),
                                  .k = problem.rows<const T>(k, *sequence, head_k, /*keys=*/true),
                                  .v = problem.rows<const T>(v, *sequence, head_k, /*keys=*/true),
                                  .out = problem.rows<const T>(out, *sequence, head, /*keys=*/false),
                                  .dout = problem.rows<const T>(dout, *sequence, head, /*keys=*/false),
                                  .lse = problem.per_query<const A>(lse, *sequence, head),
                                  .dlse = problem.per_query<const A>(dlse, *sequence, head),
                                  .softmax_scale = static_cast<A>(softmax_scale),
                                  .dk = target(dk, partial_dk, *sequence, head_k, split),
                                  .dv = target(dv, partial_dv, *sequence, head_k, split),
                                  .scratch = scratch};
          backward.run(problem.per_query<const int32_t>(route, *sequence, head, slots), slots,
                       problem.rows<T>(dq, *sequence, head, /*keys=*/false));
        }
      });
  if (!direct) {
    add_splits<T, A>(problem, partial_dk, dk);
    add_splits<T, A>(problem, partial_dv, dv);
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
  const Tensor route = with_slots(route_any, q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                  block_size);
  const Problem problem = make_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "moba::_attend_backward", [&] {
    run_all<scalar_t>(problem, dout, dlse, q, k, v, out, lse, route, softmax_scale, dq, dk, dv);
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CPU, m) { m.impl("_attend_backward", &attend_backward); }

}  // namespace moba::cpu
