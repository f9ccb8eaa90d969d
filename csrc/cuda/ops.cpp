// The CUDA kernels of the internal operators: checks, memory from the caching allocator, device and stream, and the
// plain parameters of each stage. The only file here that knows libtorch. Dense calls never synchronise with the host.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "check.h"
#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/problem.h"
#include "cuda/sm90/refusal.h"
#include "cuda/sm90/route/route.h"
#include "operators.h"

namespace moba {
namespace {

using namespace moba::cuda;

// Heads are processed in chunks, so that routing lists and partial results of one call take at most this much memory
// together (or, where that is more, what one head needs).
constexpr int64_t kListBytes = int64_t(256) << 20;
constexpr int64_t kPartialBytes = int64_t(768) << 20;

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMinChunkEntries = 2048;

// Calls f with ranges that cover `range`, each of at most `capacity` bytes but of at least `step` units.
template <class F>
void for_each_chunk(const Range& range, int64_t unit_bytes, int64_t capacity, int64_t step, F f) {
  const int64_t count = std::max<int64_t>(1, capacity / std::max<int64_t>(1, unit_bytes * step)) * step;
  for (int64_t begin = 0; begin < range.count; begin += count) {
    f(Range{range.begin + begin, std::min(count, range.count - begin)});
  }
}

// Memory for the routing lists of up to a number of units, reused from chunk to chunk.
class ListMemory {
 public:
  explicit ListMemory(const Shape& shape) : shape_(shape) {
    const int64_t entries = shape.entries();
    chunks_ =
        std::min({kMaxChunks, ceil_divide(entries, kMinChunkEntries), std::max<int64_t>(1, entries / shape.blocks())});
  }

  int64_t unit_bytes() const {
    return shape_.entries() * 12 + chunks_ * shape_.blocks() * 4 + (shape_.blocks() + 1) * 16;
  }

  // The first range is the largest.
  Lists over(const Range& units, const at::TensorOptions& options) {
    if (!entries_.defined()) {
      const auto wide = options.dtype(at::kLong), narrow = options.dtype(at::kInt);
      choices_ = at::empty({units.count, shape_.entries()}, narrow);
      counts_ = at::empty({units.count, chunks_, shape_.blocks()}, narrow);
      list_begin_ = at::empty({units.count, shape_.blocks() + 1}, wide);
      tile_begin_ = at::empty({units.count, shape_.blocks() + 1}, wide);
      entries_ = at::empty({units.count, shape_.entries()}, wide);
    }
    return {
        .units = units,
        .chunks = chunks_,
        .choices = choices_.mutable_data_ptr<int32_t>(),
        .counts = counts_.mutable_data_ptr<int32_t>(),
        .list_begin = list_begin_.mutable_data_ptr<int64_t>(),
        .tile_begin = tile_begin_.mutable_data_ptr<int64_t>(),
        .entries = entries_.mutable_data_ptr<int64_t>(),
    };
  }

 private:
  Shape shape_;
  int64_t chunks_;
  Tensor choices_, counts_, list_begin_, tile_begin_, entries_;
};

// Allocates on first use; the first range is the largest.
void* scratch(Tensor& tensor, at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!tensor.defined()) tensor = at::empty(sizes, options);
  return tensor.mutable_data_ptr();
}

Tensor route(const Tensor& q_any, const Tensor& k_any, const OptionalTensor& cu_seqlens_q,
             const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t block_size,
             int64_t slots) {
  check_route(q_any, k_any, cu_seqlens_q, cu_seqlens_k, block_size, slots);
  const c10::cuda::OptionalCUDAGuard guard(q_any.device());
  check_supported(q_any, k_any);
  check_boundaries(q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const Problem problem(q_any, k_any, cu_seqlens_q, cu_seqlens_k, block_size, slots);
  const Shape& shape = problem.shape();

  const auto options = q_any.options().dtype(at::kInt);
  const Tensor route = cu_seqlens_q.has_value() ? at::empty({shape.heads, shape.rows, slots}, options)
                                                : at::empty({shape.groups, shape.heads, shape.rows, slots}, options);
  if (problem.empty()) return route.fill_(-1);

  const bool hopper = slots <= sm90::kMaxSlots && sm90::refusal(shape, /*softmax_scale=*/1, problem.dtype()).empty();
  const Tensor q = hopper ? problem.regular_q(q_any) : with_contiguous_rows(q_any);
  const Tensor k = hopper ? problem.regular_k(k_any) : with_contiguous_rows(k_any);
  const Tensor means = at::empty({shape.units_k(), shape.blocks(), shape.head_dim}, q.options());
  const MeansParams means_params{.shape = shape, .k = problem.rows(k), .means = means.mutable_data_ptr()};
  GateParams gate{
      .shape = shape,
      .units = {0, shape.units()},
      .q = problem.rows(q),
      .means = means.const_data_ptr(),
      .candidates = nullptr,
      .route = problem.per_query_out(route),
  };
  if (hopper) {
    if (slots > 1) C10_CUDA_CHECK(sm90::launch_block_means(means_params, problem.dtype(), problem.stream()));
    C10_CUDA_CHECK(sm90::launch_gate_topk(gate, problem.dtype(), problem.stream()));
    return route;
  }
  C10_CUDA_CHECK(launch_block_means(means_params, problem.dtype(), problem.stream()));
  const int64_t kept = slots - 1 > kGateSharedCandidates ? slots - 1 : 0;
  const int64_t unit_bytes = gate.tiles() * kGateRows * kept * kGateKeyBytes;
  Tensor candidates;
  for_each_chunk(gate.units, unit_bytes, kPartialBytes, 1, [&](const Range& units) {
    gate.units = units;
    if (kept > 0) gate.candidates = scratch(candidates, {units.count * unit_bytes}, q.options().dtype(at::kByte));
    C10_CUDA_CHECK(launch_gate_topk(gate, problem.dtype(), problem.stream()));
  });
  return route;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                  const Tensor& route_any, const OptionalTensor& cu_seqlens_q,
                                  const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                  int64_t block_size, double softmax_scale, bool deterministic) {
  check_attend(q_any, k_any, v_any, route_any, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  const c10::cuda::OptionalCUDAGuard guard(q_any.device());
  check_supported(q_any, k_any);
  const bool routed = route_any.size(-1) > 0;
  if (!routed) check_boundaries(q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const Problem problem(q_any, k_any, cu_seqlens_q, cu_seqlens_k, block_size, route_any.size(-1));
  const bool hopper = !problem.empty() && sm90::refusal(problem.shape(), softmax_scale, problem.dtype()).empty();
  if (!hopper && !routed) {
    return attend(
        q_any, k_any, v_any,
        with_slots(route_any, q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size),
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size, softmax_scale, deterministic);
  }
  const Tensor out = empty_rows_like(q_any);
  const Tensor lse = at::empty(route_any.sizes().slice(0, route_any.dim() - 1), accumulator(q_any));
  if (problem.empty() || problem.unchecked()) {
    out.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
  }
  if (problem.empty()) return {out, lse};
  if (hopper) {
    const Tensor q = problem.regular_q(q_any), k = problem.regular_k(k_any), v = problem.regular_k(v_any);
    attend_hopper(problem, q, k, v, route_any.contiguous(), max_seqlen_q, max_seqlen_k, softmax_scale, out, lse);
    return {out, lse};
  }

  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any), v = with_contiguous_rows(v_any);
  const Tensor route = route_any.contiguous();
  const Shape& shape = problem.shape();

  ListMemory memory(shape);
  Tensor partial_out, partial_lse;
  const int64_t partial_bytes = shape.entries() * (shape.head_dim + 1) * lse.element_size();
  for_each_chunk({0, shape.units()}, memory.unit_bytes(), kListBytes, 1, [&](const Range& listed) {
    const Lists lists = memory.over(listed, q.options());
    C10_CUDA_CHECK(launch_lists({.shape = shape, .route = problem.per_query(route), .lists = lists}, problem.stream()));
    for_each_chunk(listed, partial_bytes, kPartialBytes, 1, [&](const Range& units) {
      const AttendParams attend{
          .shape = shape,
          .units = units,
          .lists = lists,
          .q = problem.rows(q),
          .k = problem.rows(k),
          .v = problem.rows(v),
          .softmax_scale = softmax_scale,
          .partial_out = scratch(partial_out, {units.count, shape.entries(), shape.head_dim}, accumulator(q)),
          .partial_lse = scratch(partial_lse, {units.count, shape.entries()}, accumulator(q)),
      };
      C10_CUDA_CHECK(launch_attend(attend, problem.dtype(), problem.stream()));
      const MergeParams merge{
          .shape = shape,
          .units = units,
          .lists = lists,
          .partial_out = attend.partial_out,
          .partial_lse = attend.partial_lse,
          .out = problem.rows_out(out),
          .lse = problem.per_query_out(lse),
      };
      C10_CUDA_CHECK(launch_merge(merge, problem.dtype(), problem.stream()));
    });
  });
  return {out, lse};
}

// The sums of the portable stages always run in the same order, so `deterministic` asks nothing more of them. The
// values of cu_seqlens were checked by the forward pass.
std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& dout_any, const Tensor& dlse_any, const Tensor& q_any,
                                                   const Tensor& k_any, const Tensor& v_any, const Tensor& out_any,
                                                   const Tensor& lse_any, const Tensor& route_any,
                                                   const OptionalTensor& cu_seqlens_q,
                                                   const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                   int64_t max_seqlen_k, int64_t block_size, double softmax_scale,
                                                   bool deterministic) {
  check_attend(q_any, k_any, v_any, route_any, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale);
  check_backward(dout_any, dlse_any, q_any, out_any, lse_any, cu_seqlens_q.has_value());
  const c10::cuda::OptionalCUDAGuard guard(q_any.device());
  check_supported(q_any, k_any);
  const Tensor lse = lse_any.contiguous(), dlse = dlse_any.contiguous();
  const Tensor route =
      with_slots(route_any, q_any, k_any, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size);
  const Problem problem(q_any, k_any, cu_seqlens_q, cu_seqlens_k, block_size, route.size(-1));
  const Tensor dq = empty_rows_like(q_any), dk = empty_rows_like(k_any), dv = empty_rows_like(v_any);
  if (problem.empty() || problem.unchecked()) {
    for (const Tensor& gradient : {dq, dk, dv}) gradient.zero_();
  }
  if (problem.empty()) return {dq, dk, dv};
  if (sm90::refusal(problem.shape(), softmax_scale, problem.dtype()).empty()) {
    const Tensor q = problem.regular_q(q_any), k = problem.regular_k(k_any), v = problem.regular_k(v_any);
    backward_hopper(problem, problem.regular_q(dout_any), dlse, q, k, v, problem.regular_q(out_any), lse, route,
                    softmax_scale, deterministic || at::globalContext().deterministicAlgorithms(), dq, dk, dv);
    return {dq, dk, dv};
  }

  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any), v = with_contiguous_rows(v_any);
  const Tensor dout = with_contiguous_rows(dout_any), out = with_contiguous_rows(out_any);
  const Shape& shape = problem.shape();

  ListMemory memory(shape);
  Tensor delta, partial_dq;
  const int64_t group = shape.heads_per_key_head();
  const int64_t partial_bytes = shape.entries() * shape.head_dim * lse.element_size();
  // All query heads of a key head together, as they share dk and dv.
  for_each_chunk({0, shape.units()}, memory.unit_bytes(), kListBytes, group, [&](const Range& listed) {
    const Lists lists = memory.over(listed, q.options());
    C10_CUDA_CHECK(launch_lists({.shape = shape, .route = problem.per_query(route), .lists = lists}, problem.stream()));
    const DeltaParams delta_params{
        .shape = shape,
        .units = listed,
        .dout = problem.rows(dout),
        .out = problem.rows(out),
        .dlse = problem.per_query(dlse),
        .delta = scratch(delta, {listed.count, shape.rows}, accumulator(q)),
    };
    C10_CUDA_CHECK(launch_delta(delta_params, problem.dtype(), problem.stream()));
    const BackwardKeysParams keys{
        .shape = shape,
        .units_k = {listed.begin / group, listed.count / group},
        .lists = lists,
        .q = problem.rows(q),
        .k = problem.rows(k),
        .v = problem.rows(v),
        .dout = problem.rows(dout),
        .lse = problem.per_query(lse),
        .delta = delta_params.delta,
        .softmax_scale = softmax_scale,
        .dk = problem.rows_out(dk),
        .dv = problem.rows_out(dv),
    };
    C10_CUDA_CHECK(launch_backward_keys(keys, problem.dtype(), problem.stream()));
    for_each_chunk(listed, partial_bytes, kPartialBytes, 1, [&](const Range& units) {
      const BackwardQueriesParams queries{
          .shape = shape,
          .units = units,
          .lists = lists,
          .q = keys.q,
          .k = keys.k,
          .v = keys.v,
          .dout = keys.dout,
          .lse = keys.lse,
          .delta = keys.delta,
          .softmax_scale = softmax_scale,
          .partial_dq = scratch(partial_dq, {units.count, shape.entries(), shape.head_dim}, accumulator(q)),
          .dq = problem.rows_out(dq),
      };
      C10_CUDA_CHECK(launch_backward_queries(queries, problem.dtype(), problem.stream()));
      C10_CUDA_CHECK(launch_sum_queries(queries, problem.dtype(), problem.stream()));
    });
  });
  return {dq, dk, dv};
}

// Dense layout.
std::string hopper_refusal(const Tensor& q, const Tensor& k, const Tensor& v, int64_t block_size,
                           double softmax_scale) {
  check_block_size(block_size);
  check_qk(q, k, /*packed=*/false);
  check_shape(v, "v", k.sym_sizes(), "as k");
  const c10::cuda::OptionalCUDAGuard guard(q.device());
  const Problem problem(q, k, {}, {}, block_size, /*slots=*/1);
  return sm90::refusal(problem.shape(), softmax_scale, problem.dtype());
}

}  // namespace

TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("_route", &route);
  m.impl("_attend", &attend);
  m.impl("_attend_backward", &attend_backward);
  m.impl("_hopper_refusal", &hopper_refusal);
}

}  // namespace moba

// Referenced by the rest of the crate, and itself refers to libtorch_cuda, so that linkers keep both. It takes an
// address only: on a machine without a GPU a call would throw.
extern "C" int moba_cuda_anchor() {
  int (*volatile symbol)() = &at::cuda::warp_size;
  return symbol != nullptr;
}
