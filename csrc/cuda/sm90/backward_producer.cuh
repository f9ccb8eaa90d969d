// The producer warpgroup of the backward products: takes items, gathers queries and their gradients, keys and values by
// cp.async. It has few registers, so it leaves in shared memory what it can.
#pragma once

#include "cuda/sm90/backward_memory.cuh"

namespace moba::cuda::sm90::backward {

template <class T, int kHeadDim, bool kReduce>
struct Producer {
  using M = Memory<kHeadDim>;
  // A row is copied in 16-byte parts, one a thread; a warp copies kWarpRows rows at a time, kWarpTile of a tile of
  // queries.
  static constexpr int kParts = kHeadDim / 8;
  static constexpr int kWarpRows = 32 / kParts;
  static constexpr int kRowsAtOnce = 4 * kWarpRows;
  static constexpr int kWarpTile = kQueryTile / 4;

  const BackwardParams& p;
  const Workspace& work;
  M& memory;

  Stage<M::kStages> stage;
  int own_head, own_first;  // of the tile that is looked up next; own_head is the number of heads in the list
  int list_first;

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int heads() const { return static_cast<int>(p.shape.heads_per_key_head()); }
  // The row of a tile that this lane looks up for the warp, if it is one of the first kWarpTile.
  __device__ __forceinline__ int looked_up() const { return warp() * kWarpTile + lane() % kWarpTile; }

  __device__ __forceinline__ void seek(const Item& item) {
    const int own_tiles = (item.own_rows + kQueryTile - 1) / kQueryTile, own = own_tiles * heads();
    if (item.first < own) {
      own_head = item.first / own_tiles;
      own_first = (item.first - own_head * own_tiles) * kQueryTile;
      list_first = item.list_begin;
    } else {
      own_head = heads();
      list_first = item.list_begin + (item.first - own) * kQueryTile;
    }
  }
  __device__ __forceinline__ void advance(const Item& item) {
    if (own_head == heads()) {
      list_first += kQueryTile;
      return;
    }
    own_first += kQueryTile;
    if (own_first >= item.own_rows) {
      own_first = 0;
      ++own_head;
    }
  }

  // Of row `looked_up` of the tile that is looked up next.
  __device__ __forceinline__ uint32_t entry_of(const Item& item) const {
    if (own_head == heads()) {
      const int index = list_first + looked_up();
      return index < item.list_end ? __ldg(p.lists.entries + item.unit_k * capacity(p.shape) + index) : kNobody;
    }
    const int i = own_first + looked_up();
    return i < item.own_rows ? static_cast<uint32_t>(own_head) << kRowBits | (item.own_begin + i) : kNobody;
  }

  __device__ __forceinline__ void describe(const Item& item, Tile& tile, uint32_t entry) {
    const int i = looked_up(), at = place_of(i);
    const bool own = own_head != heads();
    if (entry == kNobody) {
      tile.target[i] = kNobody;
      tile.from[i] = {-1, -1};
      cp_async_4(shared_address(&tile.lse[at]), work.lse, 0);
      cp_async_4(shared_address(&tile.delta[at]), work.delta, 0);
      return;
    }
    const int64_t head = entry >> kRowBits, row = entry & kRowMask;
    const uint32_t index = static_cast<uint32_t>(head * p.shape.rows + row);
    tile.target[i] = kReduce ? index : own ? static_cast<uint32_t>(capacity(p.shape)) + index : list_first + i;
    tile.from[i] = {static_cast<int32_t>((head * p.q.head + row * p.q.row) / 8),
                    static_cast<int32_t>((head * p.dout.head + row * p.dout.row) / 8)};
    const int64_t from = item.unit_k * heads_rows(p.shape) + index;
    cp_async_4(shared_address(&tile.lse[at]), (own ? work.own_lse : work.lse) + from, 4);
    cp_async_4(shared_address(&tile.delta[at]), work.delta + from, 4);
  }

  __device__ __forceinline__ void describe_all(const Item& item, Tile& tile, bool last) {
    const int shift = own_head == heads() ? kKeyTile : item.own_shift + own_first;
    if (kReduce) {
      tile.rows = work.sums + item.unit_k * heads_rows(p.shape) * kHeadDim;
    } else {
      tile.rows = static_cast<T*>(work.partials) +
                  (item.tile * p.lists.units_k.count + item.unit_k) * partial_rows(p.shape) * kHeadDim;
    }
    tile.kind = last ? kLast : kMore;
    tile.shift = shift;
    tile.masked = item.keys < kKeyTile || shift < kKeyTile - 1;
    tile.unit_k = item.unit_k;
    tile.key_begin = item.key_begin;
    tile.keys = item.keys;
    tile.slab = item.shares == 1 ? -1 : item.slab;
  }

  __device__ __forceinline__ const uint4* first_row(const Source& source, int unit_k) const {
    const uint32_t unit = static_cast<uint32_t>(p.lists.units_k.begin + unit_k) * heads(), all = p.shape.heads;
    return static_cast<const uint4*>(source.data) + (unit / all * source.group + unit % all * source.head) / 8 +
           lane() % kParts;
  }

  __device__ __forceinline__ void copy_rows(const Tile& tile, int unit_k) {
    const int part = lane() % kParts, row = lane() / kParts;
    const uint32_t offset = part / 8 * M::kQueryPanel + warp() * (kWarpTile * kPanelRowBytes) + swizzled(row, part % 8);
    const uint32_t queries = shared_address(memory.queries[stage.slot]) + offset;
    const uint32_t further = shared_address(memory.gradients) - shared_address(memory.queries);
    const uint4* q = first_row(p.q, unit_k);
    const uint4* dout = first_row(p.dout, unit_k);
#pragma unroll 2
    for (int i = 0; i < kWarpTile / kWarpRows; ++i) {
      const Tile::From from = tile.from[warp() * kWarpTile + i * kWarpRows + row];
      const int bytes = from.query >= 0 ? 16 : 0;
      // As swizzled() of row i * kWarpRows + row.
      const uint32_t down = i * kWarpRows * kPanelRowBytes, turn = i * kWarpRows % 8 * 16;
      const uint32_t to = (queries ^ turn) + down;
      cp_async_16(to, q + max(from.query, 0), bytes);
      cp_async_16(to + further, dout + max(from.gradient, 0), bytes);
    }
  }

  __device__ __forceinline__ void gather(const Item& item, uint32_t entry, bool last) {
    Tile& tile = memory.tiles[stage.slot];
    mbarrier_wait(shared_address(&memory.empty[stage.slot]), stage.phase ^ 1);
    if (lane() < kWarpTile) describe(item, tile, entry);
    if (threadIdx.x == 0) describe_all(item, tile, last);
    __syncwarp();
    copy_rows(tile, item.unit_k);
    publish();
  }

  __device__ __forceinline__ void publish() {
    const uint32_t full = shared_address(&memory.full[stage.slot]);
    cp_async_mbarrier_arrive(full);
    if (lane() == 0) mbarrier_arrive(full);
    stage.advance();
  }

  // Rows beyond the keys of the tile become zeros.
  __device__ __forceinline__ void load_rows(const unsigned char* to, const Source& source, const Item& item) {
    const int part = lane() % kParts, row = warp() * kWarpRows + lane() / kParts;
    const uint32_t unit_k = static_cast<uint32_t>(p.lists.units_k.begin + item.unit_k), all = p.shape.heads_k;
    const T* from = static_cast<const T*>(source.data) + unit_k / all * source.group + unit_k % all * source.head +
                    (item.key_begin + row) * source.row + part * 8;
    const uint32_t at = shared_address(to) + part / 8 * M::kKeyPanel + swizzled(row, part % 8);
#pragma unroll 1
    for (int i = 0; i < kKeyTile / kRowsAtOnce; ++i) {
      const bool there = row + i * kRowsAtOnce < item.keys;
      cp_async_16(at + i * kRowsAtOnce * kPanelRowBytes, there ? from : source.data, there ? 16 : 0);
      from += kRowsAtOnce * source.row;
    }
  }

  // The next item, for all four warps.
  __device__ __forceinline__ const Item& take(uint32_t turn) {
    Item& item = memory.items[turn];
    if (warp() == 0) {
      int next = 0;
      if (lane() == 0) next = atomicAdd(&work.counters->next, 1);
      next = __shfl_sync(0xffffffffu, next, 0);
      constexpr int kWords = sizeof(Item) / 4;
      static_assert(kWords <= 32);
      if (next >= __ldg(&work.counters->items)) {
        if (lane() == 0) item.keys = -1;
      } else if (lane() < kWords) {
        reinterpret_cast<int32_t*>(&item)[lane()] = __ldg(reinterpret_cast<const int32_t*>(work.items + next) + lane());
      }
    }
    named_barrier_sync<2, kWarpgroup>();
    return item;
  }

  __device__ __forceinline__ void run() {
    for (uint32_t turn = 0;; turn ^= 1) {
      const Item& item = take(turn);
      if (item.keys < 0) break;
      seek(item);
      uint32_t entry = entry_of(item);
#pragma unroll 1
      for (int left = item.count; left > 0; --left) {
        gather(item, entry, left == 1);
        advance(item);
        if (left > 1) entry = entry_of(item);
        if (left < item.count) continue;
        mbarrier_wait(shared_address(&memory.keys_empty), turn ^ 1);
        load_rows(memory.keys, p.k, item);
        load_rows(memory.values, p.v, item);
        cp_async_mbarrier_arrive(shared_address(&memory.keys_full));
      }
    }
    mbarrier_wait(shared_address(&memory.empty[stage.slot]), stage.phase ^ 1);
    if (threadIdx.x == 0) memory.tiles[stage.slot].kind = kStop;
    __syncwarp();
    publish();
    cp_async_wait_all();
  }
};

}  // namespace moba::cuda::sm90::backward
