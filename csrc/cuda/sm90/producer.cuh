// The producer warpgroup of the attend kernel: gathers queries by cp.async, loads keys and values by TMA.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"
#include "cuda/sm90/work.cuh"

namespace moba::cuda::sm90 {

template <class T, int kHeadDim, int kKeys, bool kResident>
struct Producer {
  using P = Plan<kHeadDim, kKeys>;
  // A row is copied in 16-byte parts, one a thread; a warp copies kWarpRows rows at a time, 16 of the tile in all.
  static constexpr int kParts = kHeadDim / 8;
  static constexpr int kWarpRows = 32 / kParts;
  static constexpr int kRowsAtOnce = 4 * kWarpRows;

  const AttendParams& p;
  const Schedule& schedule;
  const CUtensorMap* map_k;
  const CUtensorMap* map_v;
  typename P::Memory& memory;

  Ring<P::kQuerySlots> query;
  Ring<P::kKeySlots> key;
  int item = 0;
  const int64_t* entries = nullptr;  // of the unit
  int entries_end = 0;
  int next_entry = -1;  // of the row that this lane looks up for the warp
  const T* queries = static_cast<const T*>(p.q.data);

  // Keys and values to be loaded.
  struct Stream {
    int local, key_begin, steps;
  };
  Stream pending{0, 0, 0};

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int own_row() const {
    const int i = lane() % 16;
    return warp() * kWarpRows + i % kWarpRows + kRowsAtOnce * (i / kWarpRows);
  }
  __device__ __forceinline__ void fetch_entry(int first) {
    const int index = first + own_row();
    next_entry = index < entries_end ? static_cast<int>(__ldg(entries + index)) : -1;
  }

  __device__ __forceinline__ void enter_unit(int local, int first_entry) {
    const UnitLists lists(p, schedule, local);
    entries = p.lists.entries + (p.units.begin - p.lists.units.begin + local) * p.shape.entries();
    entries_end = lists.entry(lists.blocks);
    const int unit = static_cast<int>(p.units.begin) + local;
    queries = static_cast<const T*>(p.q.data) + unit / schedule.heads * p.q.group + unit % schedule.heads * p.q.head;
    fetch_entry(first_entry);
  }

  // Queries [first, first + count) of the lists, which the consumers will find with `tile`.
  __device__ __forceinline__ void gather(int first, int count, const Tile& tile) {
    Tile& to = memory.tiles[query.slot];
    const uint32_t full = shared_address(&memory.query_full[query.slot]);
    mbarrier_wait(shared_address(&memory.query_empty[query.slot]), query.phase ^ 1);
    const int entry = own_row() < count ? next_entry : -1;
    fetch_entry(first + count);  // lists follow each other
    const int own = entry >= 0 ? entry / static_cast<int>(p.shape.slots) : -1;
    if (lane() < 16) to.entry[own_row()] = entry;
    if (threadIdx.x == 0) {
      to.steps = tile.steps;
      to.count = count;
      to.local = tile.local;
      to.keys = tile.keys;
      to.shift = tile.shift;
      to.masked = tile.masked;
      to.item = tile.item;
      to.releases = tile.releases;
    }
    const int part = lane() % kParts, row = warp() * kWarpRows + lane() / kParts;
    const uint32_t slot = shared_address(memory.queries[query.slot]) + part / 8 * (kRows * kPanelRowBytes);
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      const int from = __shfl_sync(0xffffffffu, own, lane() / kParts + kWarpRows * i);
      cp_async_16(slot + swizzled(row, part % 8) + i * kRowsAtOnce * kPanelRowBytes,
                  queries + max(from, 0) * p.q.row + part * 8, from >= 0 ? 16 : 0);
    }
    cp_async_mbarrier_arrive(full);
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(full);
    query.advance();
  }

  // One thread. Rows beyond the keys of the unit arrive as zeros.
  __device__ __forceinline__ void load(const CUtensorMap* map, unsigned char* to, uint64_t* full, uint64_t* empty,
                                       int key_begin, int head, int group) {
    mbarrier_wait(shared_address(empty), key.phase ^ 1);
    mbarrier_arrive_expect_tx(shared_address(full), P::kKeyBytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(to) + panel * (kKeys * kPanelRowBytes), map, shared_address(full),
                  panel * kPanelColumns, key_begin, head, group);
    }
  }
  __device__ __forceinline__ void load_keys_and_values(const Stream& stream) {
    if (threadIdx.x == 0) {
      const int unit_k = (static_cast<int>(p.units.begin) + stream.local) / schedule.heads_per_key_head;
      const int head = unit_k % schedule.heads_k, group = unit_k / schedule.heads_k;
      for (int step = 0; step < stream.steps; ++step) {
        const int key_begin = stream.key_begin + step * kKeys;
        load(map_k, memory.keys[key.slot], &memory.key_full[key.slot], &memory.key_empty[key.slot], key_begin, head,
             group);
        load(map_v, memory.values[key.slot], &memory.value_full[key.slot], &memory.value_empty[key.slot], key_begin,
             head, group);
        key.advance();
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void go_through(int local, const Item& work) {
    if (kResident) load_keys_and_values({local, work.key_begin, 1});
    constexpr int kTogether = kResident ? 1 : kConsumers;
    for (int t = 0; t < work.count; t += kTogether) {
      int first = work.list_begin + (work.first + t) * kRows;
      const int end = min(work.list_end, first + min(work.count - t, kTogether) * kRows);
      Tile tile;
      tile.local = local;
      tile.keys = work.keys;
      tile.shift = work.shift;
      tile.item = item;
      // The current block of at most block_size queries, which come first in the list.
      tile.masked = first - work.list_begin < p.shape.block_size;
      tile.steps = 1;
      tile.releases = t + kConsumers < work.count ? 0 : work.count == 1 ? kConsumers : 1;
      if (!kResident) {
        int visible = work.keys;
        if (tile.masked) {
          const int last = static_cast<int>(__ldg(entries + end - 1));
          visible = min(visible, last / static_cast<int>(p.shape.slots) + work.shift);
        }
        tile.steps = (visible + kKeys - 1) / kKeys;
      }
#pragma unroll 1
      for (int i = 0; i < kTogether; ++i) {
        const int count = min(kRows, end - first);
        gather(first, count, tile);
        first += count;
      }
      if (!kResident) {
        // One pair of tiles later: the gather of the next pair must not wait until the consumers went through the keys
        // of this one.
        load_keys_and_values(pending);
        pending = {local, work.key_begin, tile.steps};
      }
    }
    ++item;
  }

  __device__ __forceinline__ void run() {
    for_each_share(p, schedule, [&](int local, int tile, int end) {
      bool entered = false;
      for_each_item(p, schedule, local, tile, end, [&](const Item& work) {
        if (!entered) enter_unit(local, work.list_begin + work.first * kRows);
        entered = true;
        go_through(local, work);
      });
    });
    if (!kResident) load_keys_and_values(pending);
    entries_end = 0;
    Tile stop{};
    for (int i = 0; i < kConsumers; ++i) gather(0, 0, stop);
    cp_async_wait_all();
  }
};

}  // namespace moba::cuda::sm90
