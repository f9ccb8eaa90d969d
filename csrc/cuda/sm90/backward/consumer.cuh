// A consumer warpgroup of the backward products: 64 keys of the tile times the queries that come through the ring.
//
// With S = K Q^T, P = exp(scale S - lse), dP = V dO^T and dS = P (dP - delta), all of them [keys, queries]: dV += P dO
// with P in registers; dK += dS Q and dQ = dS^T K with dS in shared memory, where each warpgroup computes half of the
// columns of dQ for all keys. The products of a tile are spread so that the tensor cores have work while this warpgroup
// exponentiates or moves dQ: dK of a tile and S of the next are under way then.
#pragma once

#include "cuda/sm90/backward/rows.cuh"
#include "cuda/sm90/backward/store.cuh"

namespace moba::cuda::sm90::backward {

template <class T, int kHeadDim, bool kReduce>
struct Consumer {
  using M = Memory<kHeadDim>;
  static constexpr int kScores = kQueryTile / 2, kSums = kHeadDim / 2, kQuery = kHeadDim / 4;
  using Row = ArrangedRow<kReduce, kQuery>;

  const BackwardParams& p;
  const Workspace& work;
  M& memory;
  float scale;  // of the scores, for powers of 2
  int half;     // which 64 keys; the same for all lanes, as the compiler has to know

  float scores[kScores], change[kScores], query[kHeadDim == 64 ? kQuery : 1];
  float dk[kSums], dv[kSums];
  uint32_t weights[kScores / 2];
  Ring<M::kStages> stage;
  uint32_t turn = 0;  // which half of memory.changes

  // Read anew each time, so that what follows from it is computed anew too instead of being kept in registers, of which
  // dk and dv leave few.
  __device__ __forceinline__ int thread() const {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread - kWarpgroup;
  }
  // Every thread, after what it read itself.
  __device__ __forceinline__ void arrive(uint64_t* barrier) { mbarrier_arrive(shared_address(barrier)); }

  template <int kCount>
  __device__ __forceinline__ void clear(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = 0;
  }

  // The columns of dq that this warpgroup computes; they take the place of the changes where these have the same
  // number.
  __device__ __forceinline__ auto& dq() {
    if constexpr (kHeadDim == 64) {
      return query;
    } else {
      return change;
    }
  }

  // to = (64 rows of keys or values) (queries or gradients)^T
  __device__ __forceinline__ void multiply_columns(float (&to)[kScores], const unsigned char* rows,
                                                   const unsigned char* tile) {
    const uint64_t a = descriptor(shared_address(rows) + half * (64 * kPanelRowBytes), 16);
    const uint64_t b = descriptor(shared_address(tile), 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      wgmma_shared<T>(to, further(a, i / 4 * M::kKeyPanel + i % 4 * 32),
                      further(b, i / 4 * M::kQueryPanel + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void multiply_scores() {
    multiply_columns(scores, memory.keys, memory.queries[stage.slot]);
  }
  __device__ __forceinline__ void multiply_change() {
    multiply_columns(change, memory.values, memory.gradients[stage.slot]);
  }

  __device__ __forceinline__ void multiply_weights() {
    const uint64_t b = descriptor(shared_address(memory.gradients[stage.slot]), M::kQueryPanel);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueryTile / 16; ++i) {
      wgmma_registers<T>(dv, weights + 4 * i, further(b, i * 16 * kPanelRowBytes), true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_queries(int slot, uint32_t turn) {
    const uint64_t a = descriptor(shared_address(memory.changes[turn]) + half * (64 * kPanelRowBytes), 16);
    const uint64_t b = descriptor(shared_address(memory.queries[slot]), M::kQueryPanel);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueryTile / 16; ++i) {
      wgmma_crossed<T>(dk, further(a, i * 32), further(b, i * 16 * kPanelRowBytes), true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_changes(uint32_t turn) {
    const uint64_t a = descriptor(shared_address(memory.changes[turn]), 16);
    const uint64_t b = descriptor(shared_address(memory.keys) + half * (kHeadDim == 64 ? 64 : M::kKeyPanel), 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeyTile / 16; ++i) {
      wgmma_transposed<T>(dq(), further(a, i * 16 * kPanelRowBytes), further(b, i * 16 * kPanelRowBytes), i > 0);
    }
    wgmma_commit();
  }

  // Pairs that do not count.
  __device__ __forceinline__ void mask(float (&values)[kScores], const Tile& tile, float with) {
    const int lane = thread() % 32, key = thread() / 32 * 16 + lane / 4;
    // Of this thread's two rows, the first query that counts.
    const int first0 = key < tile.keys ? key - tile.shift : kQueryTile;
    const int first1 = key + 8 < tile.keys ? key + 8 - tile.shift : kQueryTile;
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const int column = 8 * i + 2 * (lane % 4);
      if (column < first0) values[4 * i] = with;
      if (column + 1 < first0) values[4 * i + 1] = with;
      if (column < first1) values[4 * i + 2] = with;
      if (column + 1 < first1) values[4 * i + 3] = with;
    }
  }

  // Numbers of the queries in this thread's columns. Loaded well before they are used: while products run, shared
  // memory answers late.
  struct Numbers {
    float4 of[kScores / 8];
  };
  __device__ __forceinline__ Numbers numbers(const float (&from)[kPlaces]) const {
    const float4* at = reinterpret_cast<const float4*>(from) + thread() % 4 * 5;
    Numbers numbers;
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) numbers.of[i] = at[i];
    return numbers;
  }

  __device__ __forceinline__ void exponentiate(const Numbers& lse) {
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      const float4 base = lse.of[i];
      float* at = scores + 8 * i;
      at[0] = exp2_approximate(fmaf(at[0], scale, -base.x));
      at[1] = exp2_approximate(fmaf(at[1], scale, -base.y));
      at[2] = exp2_approximate(fmaf(at[2], scale, -base.x));
      at[3] = exp2_approximate(fmaf(at[3], scale, -base.y));
      at[4] = exp2_approximate(fmaf(at[4], scale, -base.z));
      at[5] = exp2_approximate(fmaf(at[5], scale, -base.w));
      at[6] = exp2_approximate(fmaf(at[6], scale, -base.z));
      at[7] = exp2_approximate(fmaf(at[7], scale, -base.w));
    }
  }

  __device__ __forceinline__ void differentiate(const Numbers& delta) {
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      const float4 base = delta.of[i];
      float* at = change + 8 * i;
      const float* weight = scores + 8 * i;
      at[0] = weight[0] * (at[0] - base.x);
      at[1] = weight[1] * (at[1] - base.y);
      at[2] = weight[2] * (at[2] - base.x);
      at[3] = weight[3] * (at[3] - base.y);
      at[4] = weight[4] * (at[4] - base.z);
      at[5] = weight[5] * (at[5] - base.w);
      at[6] = weight[6] * (at[6] - base.z);
      at[7] = weight[7] * (at[7] - base.w);
    }
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // A row a key, swizzled, so that it is an operand that is contiguous along the queries.
  __device__ __forceinline__ void store_changes(uint32_t changes_at) {
    const int lane = thread() % 32, row = thread() / 32 * 16 + lane % 16;
    const uint32_t to = changes_at + swizzled(row, lane / 16);
#pragma unroll
    for (int i = 0; i < kQueryTile / 16; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = pack<T>(change[8 * i + 2 * j], change[8 * i + 2 * j + 1]);
      store_matrices(to ^ 32 * i, words[0], words[1], words[2], words[3]);
    }
  }

  template <int kHalf>
  __device__ __forceinline__ Row arrange() {
    return arrange_row<T, kReduce, kHalf>(dq(), static_cast<float>(p.softmax_scale), thread());
  }
  template <int kHalf>
  __device__ __forceinline__ void store(const Row& row, const Tile& tile) {
    store_row<T, kHeadDim, kReduce, kHalf>(row, tile, half, thread());
  }

  __device__ __forceinline__ void store_slab(const float (&sums)[kSums], int slab, int which) {
    float4* to = slab_at<kHeadDim>(work.slabs, slab, which, thread());
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      to[i * kConsumerThreads] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
  }

  // Everything that comes before dq and dk of a tile. On entry its scores and then its change are the last products
  // under way; on return its dv is.
  __device__ __forceinline__ void first_half(const Numbers& lse, bool masked, int done) {
    const Tile& tile = memory.tiles[stage.slot];
    wgmma_wait<1>();  // dk of the tile before and scores
    settle(scores);
    if (done >= 0) arrive(&memory.empty[done]);
    if (masked) mask(scores, tile, -INFINITY);
    exponentiate(lse);
    const Numbers delta = numbers(tile.delta);
    pack_weights();
    multiply_weights();
    wgmma_wait<1>();
    settle(change);
    differentiate(delta);
    if (masked) mask(change, tile, 0.f);
    store_changes(shared_address(memory.changes[turn]));
    fence_proxy_async();
    named_barrier_sync<1, kConsumerThreads>();
  }

  // dq and dk of a tile, and the first half of the next one. Returns whether there is another after that.
  __device__ __forceinline__ bool step() {
    const int done = stage.slot;
    multiply_changes(turn);
    stage.advance();
    mbarrier_wait(shared_address(&memory.full[stage.slot]), stage.phase);
    fence_proxy_async();  // cp.async wrote what the products read
    const Tile& tile = memory.tiles[stage.slot];
    const bool more = tile.kind == kMore, masked = tile.masked;
    multiply_queries(done, turn);
    turn ^= 1;
    multiply_scores();
    wgmma_wait<2>();  // dv and dq
    settle(weights);
    settle(dq());
    const Row first = arrange<0>();
    if (kReduce) store<0>(first, memory.tiles[done]);  // both rows would not fit the registers
    const Row second = arrange<1>();
    multiply_change();
    if (!kReduce) store<0>(first, memory.tiles[done]);
    store<1>(second, memory.tiles[done]);
    const Numbers lse = numbers(tile.lse);
    first_half(lse, masked, done);
    return more;
  }

  // dq and dk of the last tile of an item.
  __device__ __forceinline__ void finish() {
    multiply_changes(turn);
    multiply_queries(stage.slot, turn);
    turn ^= 1;
    wgmma_wait<1>();
    settle(weights);
    settle(dq());
    store<0>(arrange<0>(), memory.tiles[stage.slot]);
    store<1>(arrange<1>(), memory.tiles[stage.slot]);
    wgmma_wait<0>();
    settle(dk);
    settle(dv);
  }

  __device__ __forceinline__ void run() {
    for (uint32_t item = 0;; item ^= 1) {
      mbarrier_wait(shared_address(&memory.full[stage.slot]), stage.phase);
      if (memory.tiles[stage.slot].kind == kStop) return;
      mbarrier_wait(shared_address(&memory.keys_full), item);
      fence_proxy_async();
      clear(scores);
      clear(change);
      clear(query);
      clear(dk);
      clear(dv);
      const Tile& tile = memory.tiles[stage.slot];
      bool more = tile.kind == kMore;
      multiply_scores();
      multiply_change();
      first_half(numbers(tile.lse), tile.masked, -1);
      while (more) more = step();
      finish();
      arrive(&memory.keys_empty);
      store_gradients(memory.tiles[stage.slot]);
      arrive(&memory.empty[stage.slot]);
      stage.advance();
    }
  }

  __device__ __forceinline__ void store_gradients(const Tile& tile) {
    if (tile.slab >= 0) {
      store_slab(dk, tile.slab, 0);
      store_slab(dv, tile.slab, 1);
      return;
    }
    if (!all_finite(dk) || !all_finite(dv)) work.counters->broken = 1;
    const int64_t unit_k = p.lists.units_k.begin + tile.unit_k;
    store_rows<T, kHeadDim>(dk, static_cast<float>(p.softmax_scale), p.dk, p.shape, unit_k, tile.key_begin, tile.keys,
                            thread());
    store_rows<T, kHeadDim>(dv, 1.f, p.dv, p.shape, unit_k, tile.key_begin, tile.keys, thread());
  }
};

}  // namespace moba::cuda::sm90::backward
