// The producer warpgroup of the past kernel. Warp 0 takes shares and fetches their lists, warp 1 loads keys and values
// by TMA, and warps 2 and 3 gather queries by cp.async: none of them waits for what only another one needs.
#pragma once

#include "cuda/sm90/past/plan.h"
#include "cuda/sm90/past/work.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90 {

constexpr int kGatherers = 2;  // warps

template <class T, int kHeadDim, int kKeys, bool kResident>
struct Producer {
  using P = Plan<kHeadDim, kKeys, kResident>;
  static constexpr int kTogether = kResident ? 1 : kStreamedTiles;
  static_assert(kStreamedTiles == P::kConsumers);

  const PastParams& p;
  const Schedule& schedule;
  const CUtensorMap* map_k;
  const CUtensorMap* map_v;
  const CUtensorMap* map_last_v;
  typename P::Memory& memory;

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }

  // entries: of the tile, with at least one; the rest of `tile` comes with it.
  __device__ __forceinline__ void push(Ring<P::kTileSlots>& ring, const uint32_t* entries, int last,
                                       const void* queries, int64_t first, int count, int item, int releases) {
    Tile& to = memory.tiles[ring.slot];
    const uint32_t full = shared_address(&memory.tile_full[ring.slot]);
    mbarrier_wait(shared_address(&memory.tile_empty[ring.slot]), ring.phase ^ 1);
    if (item >= 0) {
      cp_async_4(shared_address(&to.entry[lane()]), entries + min(lane(), last));
      cp_async_4(shared_address(&to.entry[lane() + 32]), entries + min(lane() + 32, last));
    }
    cp_async_mbarrier_arrive(full);
    if (lane() == 0) {
      to.queries = queries;
      to.first = first;
      to.count = count;
      to.item = item;
      to.releases = releases;
      mbarrier_arrive(full);
    }
    __syncwarp();
    ring.advance();
  }

  // The next share, or -1; warp 1 learns of it too. The first ones need no ticket.
  __device__ __forceinline__ int take_share(Ring<P::kShareSlots>& ring, bool first) {
    int share = 0;
    if (lane() == 0) {
      share = blockIdx.x;
      if (!first) share = gridDim.x + atomicAdd(schedule.tickets, 1);
      if (share >= schedule.shares()) {
        share = -1;
        const unsigned ended = atomicInc(reinterpret_cast<unsigned*>(schedule.tickets + 1), gridDim.x - 1);
        if (ended == gridDim.x - 1) schedule.tickets[0] = 0;  // all the others have asked for the last time
      }
      mbarrier_wait(shared_address(&memory.share_empty[ring.slot]), ring.phase ^ 1);
      memory.shares[ring.slot] = share;
      mbarrier_arrive(shared_address(&memory.share_full[ring.slot]));
    }
    ring.advance();
    return __shfl_sync(0xffffffffu, share, 0);
  }
  __device__ __forceinline__ int next_share(Ring<P::kShareSlots>& ring) {
    int share = 0;
    if (lane() == 0) {
      mbarrier_wait(shared_address(&memory.share_full[ring.slot]), ring.phase);
      share = memory.shares[ring.slot];
      mbarrier_arrive(shared_address(&memory.share_empty[ring.slot]));
    }
    ring.advance();
    return __shfl_sync(0xffffffffu, share, 0);
  }

  __device__ __forceinline__ void push_tiles() {
    Ring<P::kShareSlots> shares;
    Ring<P::kTileSlots> ring;
    int number = 0;
    for (int share = take_share(shares, true); share >= 0; share = take_share(shares, false)) {
      for_each_part<kTogether>(p, schedule, share, [&](int local, const UnitLists& lists, int tile, int end) {
        const int64_t unit_first = local * capacity(p.shape);
        const uint32_t* entries = p.lists.entries + unit_first;
        const int unit_k = static_cast<int>(p.lists.units_k.begin) + local;
        const T* queries = static_cast<const T*>(p.q.data) + unit_k / schedule.heads_k * p.q.group +
                           static_cast<int64_t>(unit_k % schedule.heads_k) * schedule.group * p.q.head;
        for_each_item(lists, tile, end, [&](const Item& item) {
#pragma unroll 1
          for (int t = 0; t < item.tiles; ++t) {
            const int first = item.first_entry + t * kRows;
            const int count = max(min(kRows, item.list_end - first), 0);
            int releases = t + P::kConsumers >= item.tiles;
            if (t + 1 == item.tiles) releases += max(P::kConsumers - item.tiles, 0);
            const int from = min(first, item.list_end - 1);
            push(ring, entries + from, max(count - 1, 0), queries, unit_first + first, count, number, releases);
          }
          ++number;
        });
      });
    }
    for (int i = 0; i < P::kConsumers; ++i) push(ring, nullptr, 0, nullptr, 0, 0, -1, 0);
    cp_async_wait_all();
  }

  // One thread. Rows beyond the keys of the unit arrive as zeros.
  __device__ __forceinline__ void load(const CUtensorMap* map, unsigned char* to, uint64_t* full, int bytes,
                                       int key_begin, int head, int group) {
    mbarrier_arrive_expect_tx(shared_address(full), bytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(to) + panel * (kKeys * kPanelRowBytes), map, shared_address(full),
                  panel * kPanelColumns, key_begin, head, group);
    }
  }

  // The rows of a value tile that the last load of a block does not write: weights of 0 must meet nothing that is NaN.
  __device__ __forceinline__ void clear_values(unsigned char* values) {
    for (int i = schedule.last_keys * 8 + lane(); i < kKeys * 8; i += 32) {
#pragma unroll
      for (int panel = 0; panel < P::kPanels; ++panel) {
        *reinterpret_cast<uint4*>(values + panel * (kKeys * kPanelRowBytes) + i * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_proxy_async();
    __syncwarp();
  }

  // A row is copied in 16-byte parts, one a lane. Lanes that share a row go through kEach rows that lie together, so
  // that they read their entries 16 bytes at a time, before the first copy.
  __device__ __forceinline__ void gather() {
    constexpr int kParts = kHeadDim / 8, kEach = kRows * kParts / (32 * kGatherers);
    const int part = lane() % kParts, first_row = (threadIdx.x - 32 * (4 - kGatherers)) / kParts * kEach;
    const uint32_t place = part / 8 * (kRows * kPanelRowBytes) + first_row * kPanelRowBytes + part % 8 * 16;
    const int64_t head_bytes = p.q.head * 2;
    Ring<P::kTileSlots> ring;
    Ring<P::kQuerySlots> query;
    for (int stops = 0; stops < P::kConsumers; ring.advance(), query.advance()) {
      const Tile& tile = memory.tiles[ring.slot];
      const uint32_t full = shared_address(&memory.query_full[query.slot]);
      mbarrier_wait(shared_address(&memory.tile_full[ring.slot]), ring.phase);
      if (tile.count > 0) {
        uint32_t entries[kEach];
#pragma unroll
        for (int i = 0; i < kEach; i += 4) {
          const uint4 four = *reinterpret_cast<const uint4*>(tile.entry + first_row + i);
          entries[i] = four.x;
          entries[i + 1] = four.y;
          entries[i + 2] = four.z;
          entries[i + 3] = four.w;
        }
        const char* queries = static_cast<const char*>(tile.queries) + part * 16;
        const uint32_t to = shared_address(memory.queries[query.slot]) + place;
        mbarrier_wait(shared_address(&memory.query_empty[query.slot]), query.phase ^ 1);
        const auto copy = [&](auto grouped) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const uint32_t row = grouped.value ? entries[i] & (kMaxRows - 1) : entries[i];
            const char* from = queries + static_cast<uint64_t>(row) * schedule.row_bytes;
            if (grouped.value) from += (entries[i] >> kRowBits) * head_bytes;
            cp_async_16((to ^ i % 8 * 16) + i * kPanelRowBytes, from);  // see swizzled
          }
        };
        if (schedule.group > 1) {
          copy(std::true_type());
        } else {
          copy(std::false_type());
        }
      } else {
        mbarrier_wait(shared_address(&memory.query_empty[query.slot]), query.phase ^ 1);
        if (tile.item < 0) ++stops;
      }
      cp_async_mbarrier_arrive(full);
    }
    cp_async_wait_all();
  }

  __device__ __forceinline__ void load_keys_and_values() {
    Ring<P::kShareSlots> shares;
    Ring<P::kKeySlots> ring;
    Ring<P::kFullBarriers> full;
    const Sequences sequences(p.shape);
    for (int share; (share = next_share(shares)) >= 0;) {
      for_each_part<kTogether>(p, schedule, share, [&](int local, const UnitLists& lists, int tile, int end) {
        const int unit_k = static_cast<int>(p.lists.units_k.begin) + local;
        const int head = unit_k % schedule.heads_k, group = unit_k / schedule.heads_k;
        for_each_item(lists, tile, end, [&](const Item& item) {
          const int begin = sequences.first_key(item.block);
          const int visits = kResident ? 1 : item.tiles / kTogether;
          for (int visit = 0; visit < visits; ++visit) {
            for (int step = 0; step < (kResident ? 1 : schedule.steps); ++step) {
              load_step(ring, full.slot, begin + step * kKeys, kResident || step + 1 == schedule.steps, head, group);
              ring.advance();
              full.advance();
            }
          }
        });
      });
    }
  }

  __device__ __forceinline__ void load_step(const Ring<P::kKeySlots>& ring, int full, int key_begin, bool last,
                                            int head, int group) {
    mbarrier_wait(shared_address(&memory.key_empty[ring.slot]), ring.phase ^ 1);
    if (lane() == 0) {
      load(map_k, memory.keys[ring.slot], &memory.key_full[full], P::kKeyBytes, key_begin, head, group);
    }
    mbarrier_wait(shared_address(&memory.value_empty[ring.slot]), ring.phase ^ 1);
    if (last && schedule.last_keys < kKeys) clear_values(memory.values[ring.slot]);
    if (lane() == 0) {
      load(last ? map_last_v : map_v, memory.values[ring.slot], &memory.value_full[full],
           (last ? schedule.last_keys : kKeys) * kHeadDim * 2, key_begin, head, group);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      push_tiles();
    } else if (warp == 1) {
      load_keys_and_values();
    } else {
      gather();
    }
  }
};

}  // namespace moba::cuda::sm90
