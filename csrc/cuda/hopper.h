// The Hopper stages of a call, over as many key heads at a time as memory allows.
// Part of ops.cpp, which includes libtorch's headers before it.
#pragma once

#include <algorithm>

#include "cuda/problem.h"
#include "cuda/sm90/backward/backward.h"
#include "cuda/sm90/current/current.h"
#include "cuda/sm90/launch.h"

namespace moba::cuda {

// What routing lists and partial results of one call take at most (or, where that is more, what one key head needs).
constexpr int64_t kHopperBytes = int64_t(2) << 30;

// Cuts arrays from a piece of memory; from none it only measures.
struct Cutter {
  char* memory = nullptr;
  int64_t used = 0;

  template <class T>
  T* cut(int64_t count) {
    T* array = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += ceil_divide(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return array;
  }
};

inline sm90::PastLists cut_lists(Cutter& cutter, const Shape& shape, const Range& units_k) {
  const int64_t units = units_k.count, chunks = sm90::list_chunks(shape), blocks = shape.blocks();
  return {
      .units_k = units_k,
      .chunks = chunks,
      .counts = cutter.cut<int32_t>(units * chunks * blocks),
      .list_begin = cutter.cut<int32_t>(units * (blocks + 1)),
      .tile_begin = cutter.cut<int32_t>(units * (blocks + 1)),
      .entries = cutter.cut<uint32_t>(units * sm90::capacity(shape)),
      .positions = cutter.cut<int32_t>(units * sm90::capacity(shape)),
  };
}

inline sm90::Partials cut_partials(Cutter& cutter, const Shape& shape, const Range& units_k) {
  const int64_t entries = units_k.count * sm90::capacity(shape);
  return {.out = cutter.cut<uint16_t>(entries * shape.head_dim), .lse = cutter.cut<float>(entries)};
}

// Calls f(key heads, memory) for all key heads, as many at a time as kHopperBytes and the device allow for.
// bytes_of(n): what n of them need; some of it, bytes_of(0), does not grow with them.
template <class Measure, class F>
void for_key_heads(const Shape& shape, const at::TensorOptions& options, Measure bytes_of, F f) {
  const int64_t units = shape.units_k();
  const int64_t fixed = bytes_of(0), each = std::max<int64_t>(1, bytes_of(1) - fixed);
  int64_t count = std::clamp<int64_t>((kHopperBytes - fixed) / each, 1, units);
  count = ceil_divide(units, ceil_divide(units, count));  // equal chunks
  Tensor memory;
  while (!memory.defined()) {
    try {
      memory = at::empty({bytes_of(count)}, options.dtype(at::kByte));
    } catch (const c10::OutOfMemoryError&) {
      TORCH_CHECK_WITH(OutOfMemoryError, count > 1, "moba attention: wanted ", bytes_of(1) >> 20,
                       " MiB of workspace (one of ", units, " key heads), more than the device has left");
      count = ceil_divide(count, 2);
    }
  }
  for (int64_t begin = 0; begin < units; begin += count) {
    f(Range{begin, std::min(count, units - begin)}, static_cast<char*>(memory.mutable_data_ptr()));
  }
}

inline void attend_hopper(const Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& route, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                          const Tensor& out, const Tensor& lse) {
  const Shape& shape = problem.shape();
  const bool query_major = sm90::query_major(shape, max_seqlen_q, max_seqlen_k);
  const bool listed = shape.slots > 0 && !query_major;
  const auto attend = [&](const sm90::PastLists& lists, const sm90::Partials& partials) {
    if (listed) {
      const sm90::PastParams past{
          .shape = shape,
          .lists = lists,
          .q = problem.rows(q),
          .k = problem.rows(k),
          .v = problem.rows(v),
          .softmax_scale = softmax_scale,
          .partials = partials,
      };
      C10_CUDA_CHECK(sm90::launch_past_lists({.shape = shape, .route = problem.per_query(route), .lists = lists},
                                             problem.stream()));
      C10_CUDA_CHECK(sm90::launch_past(past, problem.dtype(), problem.stream()));
    }
    const sm90::CurrentParams current{
        .shape = shape,
        .lists = lists,
        .q = problem.rows(q),
        .k = problem.rows(k),
        .v = problem.rows(v),
        .softmax_scale = softmax_scale,
        .partials = partials,
        .out = problem.rows_out(out),
        .lse = problem.per_query_out(lse),
        .route = query_major ? problem.per_query(route) : Source{},
    };
    C10_CUDA_CHECK(sm90::launch_current(current, problem.dtype(), problem.stream()));
  };
  if (!listed) return attend({.units_k = {0, shape.units_k()}}, {});

  const auto bytes_of = [&](int64_t units_k) {
    Cutter cutter;
    cut_lists(cutter, shape, {0, units_k});
    cut_partials(cutter, shape, {0, units_k});
    return cutter.used;
  };
  for_key_heads(shape, q.options(), bytes_of, [&](const Range& units_k, char* memory) {
    Cutter cutter{memory};
    const auto lists = cut_lists(cutter, shape, units_k);
    attend(lists, cut_partials(cutter, shape, units_k));
  });
}

inline void backward_hopper(const Problem& problem, const Tensor& dout, const Tensor& dlse, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& route,
                            double softmax_scale, bool deterministic, const Tensor& dq, const Tensor& dk,
                            const Tensor& dv) {
  const Shape& shape = problem.shape();
  const auto plan_for = [&](int64_t units_k) {
    sm90::BackwardPlan plan;
    C10_CUDA_CHECK(sm90::plan_backward(plan, shape, units_k, deterministic, kHopperBytes));
    return plan;
  };
  const auto bytes_of = [&](int64_t units_k) {
    Cutter cutter;
    cut_lists(cutter, shape, {0, units_k});
    return cutter.used + plan_for(units_k).bytes;
  };
  for_key_heads(shape, q.options(), bytes_of, [&](const Range& units_k, char* memory) {
    Cutter cutter{memory};
    const sm90::BackwardParams params{
        .shape = shape,
        .lists = cut_lists(cutter, shape, units_k),
        .q = problem.rows(q),
        .k = problem.rows(k),
        .v = problem.rows(v),
        .out = problem.rows(out),
        .dout = problem.rows(dout),
        .lse = problem.per_query(lse),
        .dlse = problem.per_query(dlse),
        .softmax_scale = softmax_scale,
        .dq = problem.rows_out(dq),
        .dk = problem.rows_out(dk),
        .dv = problem.rows_out(dv),
    };
    C10_CUDA_CHECK(sm90::launch_past_lists({.shape = shape, .route = problem.per_query(route), .lists = params.lists},
                                           problem.stream()));
    const auto plan = plan_for(units_k.count);
    C10_CUDA_CHECK(
        sm90::launch_backward(params, plan, cutter.cut<char>(plan.bytes), problem.dtype(), problem.stream()));
  });
}

}  // namespace moba::cuda
