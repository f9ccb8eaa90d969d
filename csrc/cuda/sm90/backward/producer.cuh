// The producer warpgroup of the backward products: takes items, gathers queries and their gradients, keys and values by
// cp.async. It has few registers, so it leaves in shared memory what it can.
#pragma once

#include "cuda/sm90/backward/plan.cuh"

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

  Ring<M::kStages> stage;
  const uint4* queries;     // of the key head's first head
  const uint4* gradients;   // of the queries
  const Item* source;       // of `item`, for what is rarely read
  Item item;                // the same for all lanes, as the compiler has to know: uniform registers are many
  int own_head, own_first;  // of the tile that is looked up next; own_head is the number of heads in the list
  int list_first;

  // Read anew each time: what follows from it is not to be kept in registers.
  __device__ __forceinline__ unsigned thread() const {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  }
  __device__ __forceinline__ int lane() const { return thread() % 32; }
  __device__ __forceinline__ int warp() const { return thread() / 32; }
  __device__ __forceinline__ static int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
  template <class P>
  __device__ __forceinline__ static P* uniform(P* pointer) {
    const uint64_t value = reinterpret_cast<uint64_t>(pointer);
    const uint32_t low = uniform(static_cast<int>(value)), high = uniform(static_cast<int>(value >> 32));
    return reinterpret_cast<P*>(uint64_t(high) << 32 | low);
  }
  // The row of a tile that this lane looks up for the warp, if it is one of the first kWarpTile.
  __device__ __forceinline__ int looked_up() const { return warp() * kWarpTile + lane() % kWarpTile; }
  __device__ __forceinline__ bool in_list() const { return own_head == work.heads; }

  __device__ __forceinline__ void seek() {
    const int own_tiles = (item.own_rows + kQueryTile - 1) / kQueryTile, own = own_tiles * work.heads;
    own_head = work.heads;
    own_first = 0;
    list_first = item.list_begin;
    if (item.first < own) {
      own_head = item.first / own_tiles;
      own_first = (item.first - own_head * own_tiles) * kQueryTile;
    } else {
      list_first += (item.first - own) * kQueryTile;
    }
  }
  __device__ __forceinline__ void advance() {
    if (in_list()) {
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
  __device__ __forceinline__ uint32_t entry_of() const {
    if (in_list()) {
      const int index = list_first + looked_up();
      return index < item.list_end ? __ldg(p.lists.entries + item.unit_k * work.entries + index) : kNobody;
    }
    const int i = own_first + looked_up();
    return i < item.own_rows ? static_cast<uint32_t>(own_head) << kRowBits | (item.own_begin + i) : kNobody;
  }

  __device__ __forceinline__ void describe(Tile& tile, uint32_t entry) {
    const int i = looked_up(), at = place_of(i);
    const bool there = entry != kNobody, own = !in_list();
    const uint32_t head = there ? entry >> kRowBits : 0, row = there ? entry & kRowMask : 0;
    const uint32_t index = head * static_cast<uint32_t>(p.shape.rows) + row;
    const uint32_t part = own ? static_cast<uint32_t>(work.entries) + index : list_first + i;
    const uint32_t target = kReduce ? index : part * work.pass_tiles;
    tile.target[i] = there ? target : kNobody;
    tile.queries[i] = there ? static_cast<int32_t>((head * p.q.head + row * p.q.row) / 8) : -1;
    tile.gradients[i] = there ? static_cast<int32_t>((head * p.dout.head + row * p.dout.row) / 8) : -1;
    const int64_t from = item.unit_k * work.rows + index;
    cp_async_4(shared_address(&tile.lse[at]), (own ? work.own_lse : work.lse) + from, there ? 4 : 0);
    cp_async_4(shared_address(&tile.delta[at]), work.delta + from, there ? 4 : 0);
  }

  __device__ __forceinline__ void describe_all(Tile& tile, bool last) {
    const int shift = in_list() ? kKeyTile : item.own_shift + own_first;
    if (kReduce) {
      tile.rows = work.sums + item.unit_k * work.rows * kHeadDim;
    } else {
      tile.rows = static_cast<T*>(work.partials) +
                  (item.unit_k * work.partial_rows * work.pass_tiles + source->tile) * kHeadDim;
    }
    tile.kind = last ? kLast : kMore;
    tile.shift = shift;
    tile.masked = item.keys < kKeyTile || shift < kKeyTile - 1;
    tile.keys = item.keys;
    if (!last) return;
    tile.unit_k = item.unit_k;
    tile.key_begin = source->key_begin;
    tile.slab = source->shares == 1 ? -1 : source->slab;
  }

  // Rows of the queries or of their gradients.
  __device__ __forceinline__ void copy_rows(const unsigned char* to, const uint4* base, const int32_t* rows) {
    const uint4* from = base + lane() % kParts;
    const int part = lane() % kParts, row = lane() / kParts;
    const uint32_t at = shared_address(to) + part / 8 * M::kQueryPanel + warp() * (kWarpTile * kPanelRowBytes) +
                        swizzled(row, part % 8);
    constexpr int kAtOnce = 4;
#pragma unroll
    for (int first = 0; first < kWarpTile / kWarpRows; first += kAtOnce) {
      int32_t offsets[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) offsets[i] = rows[warp() * kWarpTile + (first + i) * kWarpRows + row];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        // As swizzled() of row (first + i) * kWarpRows + row.
        const int down = (first + i) * kWarpRows;
        cp_async_16((at ^ down % 8 * 16) + down * kPanelRowBytes, from + max(offsets[i], 0), offsets[i] >= 0 ? 16 : 0);
      }
    }
  }

  __device__ __forceinline__ void gather(uint32_t entry, bool last) {
    Tile& tile = memory.tiles[stage.slot];
    mbarrier_wait(shared_address(&memory.empty[stage.slot]), stage.phase ^ 1);
    if (lane() < kWarpTile) describe(tile, entry);
    if (threadIdx.x == 0) describe_all(tile, last);
    __syncwarp();
    copy_rows(memory.queries[stage.slot], queries, tile.queries);
    copy_rows(memory.gradients[stage.slot], gradients, tile.gradients);
    publish();
  }

  __device__ __forceinline__ void publish() {
    const uint32_t full = shared_address(&memory.full[stage.slot]);
    cp_async_mbarrier_arrive(full);
    mbarrier_arrive(full);
    stage.advance();
  }

  // Rows beyond the keys of the tile become zeros.
  __device__ __forceinline__ void load_rows(const unsigned char* to, const Source& rows) {
    const int part = lane() % kParts, row = warp() * kWarpRows + lane() / kParts;
    const uint32_t unit_k = static_cast<uint32_t>(p.lists.units_k.begin + item.unit_k), all = p.shape.heads_k;
    const T* from = static_cast<const T*>(rows.data) + unit_k / all * rows.group + unit_k % all * rows.head +
                    (source->key_begin + row) * rows.row + part * 8;
    const uint32_t at = shared_address(to) + part / 8 * M::kKeyPanel + swizzled(row, part % 8);
#pragma unroll 1
    for (int i = 0; i < kKeyTile / kRowsAtOnce; ++i) {
      const bool there = row + i * kRowsAtOnce < item.keys;
      cp_async_16(at + i * kRowsAtOnce * kPanelRowBytes, there ? from : rows.data, there ? 16 : 0);
      from += kRowsAtOnce * rows.row;
    }
  }

  __device__ __forceinline__ const uint4* first_row(const Source& rows) const {
    const uint32_t unit = static_cast<uint32_t>(p.lists.units_k.begin + item.unit_k) * work.heads, all = p.shape.heads;
    return uniform(static_cast<const uint4*>(rows.data) + (unit / all * rows.group + unit % all * rows.head) / 8);
  }

  // The next item, for all four warps; false if there is none.
  __device__ __forceinline__ bool take(uint32_t turn) {
    int& next = memory.items[turn];
    if (threadIdx.x == 0) next = atomicAdd(&work.counters->next, 1);
    named_barrier_sync<2, kWarpgroup>();
    const int index = uniform(next);
    if (index >= uniform(__ldg(&work.counters->items))) return false;
    const Item& from = work.items[index];
    item.unit_k = uniform(from.unit_k);
    item.keys = uniform(from.keys);
    item.own_begin = uniform(from.own_begin);
    item.own_rows = uniform(from.own_rows);
    item.own_shift = uniform(from.own_shift);
    item.list_begin = uniform(from.list_begin);
    item.list_end = uniform(from.list_end);
    item.first = uniform(from.first);
    item.count = uniform(from.count);
    source = uniform(&from);
    queries = first_row(p.q);
    gradients = first_row(p.dout);
    return true;
  }

  __device__ __forceinline__ void run() {
    for (uint32_t turn = 0; take(turn); turn ^= 1) {
      seek();
      uint32_t entry = entry_of();
#pragma unroll 1
      for (int left = item.count; left > 0; --left) {
        gather(entry, left == 1);
        advance();
        if (left > 1) entry = entry_of();
        if (left < item.count) continue;
        mbarrier_wait(shared_address(&memory.keys_empty), turn ^ 1);
        load_rows(memory.keys, p.k);
        load_rows(memory.values, p.v);
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
