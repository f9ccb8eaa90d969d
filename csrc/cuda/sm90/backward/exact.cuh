// The gradients of one row or key, term by term. The products multiply pairs that do not count by 0, which is NaN where
// a key, query or gradient is NaN or infinite; what came out not finite is computed again here, without those pairs.
// head_dim / 8 lanes work on a row, 8 consecutive columns each.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward/work.h"

namespace moba::cuda::sm90::backward {

template <class T, int kHeadDim>
struct Exact {
  static constexpr int kColumns = 8;
  static constexpr int kLanes = kHeadDim / kColumns;
  using Columns = float[kColumns];

  const BackwardParams& p;
  const Workspace& work;
  int lane;
  unsigned lanes;

  __device__ Exact(const BackwardParams& p, const Workspace& work)
      : p(p),
        work(work),
        lane(threadIdx.x % kLanes),
        lanes(((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes)) {}

  __device__ void load(Columns& to, const Source& source, int64_t unit, int64_t heads, int64_t row) const {
    const T* from = unit_base<T>(source, unit, heads) + row * source.row + lane * kColumns;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) to[i] = to_acc(from[i]);
  }
  __device__ float dot(const Columns& a, const Columns& b) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += a[i] * b[i];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(lanes, sum, offset);
    return sum;
  }
  __device__ bool all_finite(const T* row) const {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) finite &= isfinite(to_acc(row[lane * kColumns + i])) != 0;
    return __all_sync(lanes, finite);
  }
  __device__ void store(T* row, const Columns& values) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row[lane * kColumns + i] = from_acc<T>(values[i]);
  }

  struct Pair {
    float weight, change;
  };
  __device__ Pair pair(const Columns& q, const Columns& dout, const Columns& k, const Columns& v, float lse,
                       float delta) const {
    const float weight = exp2f(dot(q, k) * (static_cast<float>(p.softmax_scale) * kLog2e) - lse);
    return {weight, weight * (dot(dout, v) - delta)};
  }

  // dq of a row of the `local`-th unit of the lists.
  __device__ void query(Columns& dq, int64_t local, int64_t row) const {
    const Shape& shape = p.shape;
    const int64_t unit_k = local / shape.heads_per_key_head(), index = local * shape.rows + row;
    const int64_t first_unit = p.lists.units_k.begin * shape.heads_per_key_head();
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dq[i] = 0;
    const float lse = work.lse[index], delta = work.delta[index];
    if (lse == INFINITY) return;
    Columns q, dout, k, v;
    load(q, p.q, first_unit + local, shape.heads, row);
    load(dout, p.dout, first_unit + local, shape.heads, row);
    const Sequence sequence = sequence_of_row(shape, row);
    const int64_t position = sequence.position(row);
#pragma unroll 1
    for (int64_t slot = 0; slot < shape.slots; ++slot) {
      const int32_t entry = p.lists.positions[index * shape.slots + slot];
      if (entry == kUnused) continue;
      const int64_t number = entry == kCurrent ? first_part(sequence.key_begin, sequence.index, shape.block_size) +
                                                     position / shape.block_size
                                               : list_of(unit_k, entry);
      const Block block = block_at(shape, number);
      const int64_t keys = min(block.keys, position + 1 - (block.key_begin - sequence.key_begin));
#pragma unroll 1
      for (int64_t key = 0; key < keys; ++key) {
        load(k, p.k, p.lists.units_k.begin + unit_k, shape.heads_k, block.key_begin + key);
        load(v, p.v, p.lists.units_k.begin + unit_k, shape.heads_k, block.key_begin + key);
        const Pair at = pair(q, dout, k, v, lse, delta);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) dq[i] += at.change * k[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dq[i] *= static_cast<float>(p.softmax_scale);
  }

  // The block whose list holds this entry.
  __device__ int64_t list_of(int64_t unit_k, int32_t entry) const {
    const int32_t* list_begin = p.lists.list_begin + unit_k * (p.shape.blocks() + 1);
    int64_t low = 0, high = p.shape.blocks() - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (list_begin[middle] <= entry) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // dk and dv of key `key` of a tile.
  __device__ void key(Columns& dk, Columns& dv, const Item& tile, int key) const {
    const Shape& shape = p.shape;
    const int64_t unit_k = p.lists.units_k.begin + tile.unit_k;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dk[i] = dv[i] = 0;
    Columns k, v;
    load(k, p.k, unit_k, shape.heads_k, tile.key_begin + key);
    load(v, p.v, unit_k, shape.heads_k, tile.key_begin + key);
    const auto add = [&](int64_t head, int64_t row, const float* lse_of) {
      const int64_t index = tile.unit_k * heads_rows(shape) + head * shape.rows + row;
      const float lse = lse_of[index];
      if (lse == INFINITY) return;
      const int64_t unit = unit_k * shape.heads_per_key_head() + head;
      Columns q, dout;
      load(q, p.q, unit, shape.heads, row);
      load(dout, p.dout, unit, shape.heads, row);
      const Pair at = pair(q, dout, k, v, lse, work.delta[index]);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        dk[i] += at.change * q[i];
        dv[i] += at.weight * dout[i];
      }
    };
#pragma unroll 1
    for (int64_t head = 0; head < shape.heads_per_key_head(); ++head) {
#pragma unroll 1
      for (int64_t i = max(key - tile.own_shift, 0); i < tile.own_rows; ++i)
        add(head, tile.own_begin + i, work.own_lse);
    }
    const uint32_t* entries = p.lists.entries + tile.unit_k * capacity(shape);
#pragma unroll 1
    for (int64_t i = tile.list_begin; i < tile.list_end; ++i) {
      add(entries[i] >> kRowBits, entries[i] & kRowMask, work.lse);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dk[i] *= static_cast<float>(p.softmax_scale);
  }
};

}  // namespace moba::cuda::sm90::backward
