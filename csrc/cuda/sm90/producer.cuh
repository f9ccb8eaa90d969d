// The producer warpgroup of the past kernel. Warp 0 tells the consumers which queries to gather; warp 1 loads keys and
// values by TMA; warps 2 and 3 permute the columns of resident keys.
#pragma once

#include "cuda/sm90/plan.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"
#include "cuda/sm90/work.cuh"

namespace moba::cuda::sm90 {

constexpr int kPermuters = 2;  // warps

template <class T, int kHeadDim, int kKeys, bool kResident>
struct Producer {
  using P = Plan<kHeadDim, kKeys, kResident>;
  static constexpr int kTogether = kResident ? 1 : P::kConsumers;

  const PastParams& p;
  const Schedule& schedule;
  const CUtensorMap* map_k;
  const CUtensorMap* map_v;
  typename P::Memory& memory;

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }

  // entries: of the tile, with at least one; the rest of `tile` comes with it.
  __device__ __forceinline__ void push(Ring<P::kTileSlots>& ring, const uint32_t* entries, int last, const void* queries,
                                       int64_t first, int count, int item, int releases) {
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

  __device__ __forceinline__ void push_tiles() {
    Ring<P::kTileSlots> ring;
    int number = 0;
    for_each_share<kTogether>(p, schedule, [&](int local, const UnitLists& lists, int tile, int end) {
      const int64_t unit_first = local * capacity(p.shape);
      const uint32_t* entries = p.lists.entries + unit_first;
      const int unit_k = static_cast<int>(p.lists.units_k.begin) + local;
      const T* queries = static_cast<const T*>(p.q.data) + unit_k / schedule.heads_k * p.q.group +
                         static_cast<int64_t>(unit_k % schedule.heads_k) * schedule.group * p.q.head;
      for_each_item(lists, tile, end, [&](const Item& item) {
        const int rounded = (item.tiles + kTogether - 1) / kTogether * kTogether;
#pragma unroll 1
        for (int t = 0; t < rounded; ++t) {
          const int first = item.first_entry + t * kRows;
          const int count = t < item.tiles ? min(kRows, item.list_end - first) : 0;
          int releases = t + P::kConsumers >= item.tiles;
          if (t + 1 == item.tiles) releases += max(P::kConsumers - item.tiles, 0);
          const int from = min(first, item.list_end - 1);
          push(ring, entries + from, max(count - 1, 0), queries, unit_first + first, count, number, releases);
        }
        ++number;
      });
    });
    for (int i = 0; i < P::kConsumers; ++i) push(ring, nullptr, 0, nullptr, 0, 0, -1, 0);
    cp_async_wait_all();
  }

  // One thread. Rows beyond the keys of the unit arrive as zeros.
  __device__ __forceinline__ void load(const CUtensorMap* map, unsigned char* to, uint64_t* full, uint64_t* empty,
                                       uint32_t phase, int key_begin, int head, int group) {
    mbarrier_wait(shared_address(empty), phase ^ 1);
    mbarrier_arrive_expect_tx(shared_address(full), P::kKeyBytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(to) + panel * (kKeys * kPanelRowBytes), map, shared_address(full),
                  panel * kPanelColumns, key_begin, head, group);
    }
  }

  // Within each 32 columns of a key, words 4 j + g become words 4 g + j: where the scores' product, which takes columns
  // in another order than consumers hold them, looks for them.
  __device__ __forceinline__ void permute(uint32_t keys) const {
    constexpr int kParts = kHeadDim / 32;
    for (int i = threadIdx.x - 64; i < kKeys * kParts; i += 32 * kPermuters) {
      const int row = i % kKeys, part = i / kKeys;
      const uint32_t at = keys + part / 2 * (kKeys * kPanelRowBytes) + row * kPanelRowBytes;
      const int first = part % 2 * 4, turn = row % 8;
      uint32_t to[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = at + ((first + j) ^ turn) * 16;
      const uint4 a = shared_load(to[0]), b = shared_load(to[1]), c = shared_load(to[2]), d = shared_load(to[3]);
      shared_store(to[0], a.x, b.x, c.x, d.x);
      shared_store(to[1], a.y, b.y, c.y, d.y);
      shared_store(to[2], a.z, b.z, c.z, d.z);
      shared_store(to[3], a.w, b.w, c.w, d.w);
    }
  }

  __device__ __forceinline__ void permute_keys() {
    for (Ring<P::kKeySlots> ring;; ring.advance()) {
      mbarrier_wait(shared_address(&memory.key_loaded[ring.slot]), ring.phase);
      if (memory.no_keys[ring.slot]) return;
      permute(shared_address(memory.keys[ring.slot]));
      fence_proxy_async();
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(shared_address(&memory.key_full[ring.slot]));
    }
  }

  __device__ __forceinline__ void load_keys_and_values() {
    Ring<P::kKeySlots> ring;
    const Sequences sequences(p.shape);
    for_each_share<kTogether>(p, schedule, [&](int local, const UnitLists& lists, int tile, int end) {
      const int unit_k = static_cast<int>(p.lists.units_k.begin) + local;
      const int head = unit_k % schedule.heads_k, group = unit_k / schedule.heads_k;
      for_each_item(lists, tile, end, [&](const Item& item) {
        const int begin = sequences.first_key(item.block);
        const int visits = kResident ? 1 : (item.tiles + P::kConsumers - 1) / P::kConsumers;
        for (int visit = 0; visit < visits; ++visit) {
          for (int step = 0; step < (kResident ? 1 : schedule.steps); ++step, ring.advance()) {
            if (lane() == 0) {
              load(map_k, memory.keys[ring.slot], kResident ? &memory.key_loaded[ring.slot] : &memory.key_full[ring.slot],
                   &memory.key_empty[ring.slot], ring.phase, begin + step * kKeys, head, group);
              load(map_v, memory.values[ring.slot], &memory.value_full[ring.slot], &memory.value_empty[ring.slot],
                   ring.phase, begin + step * kKeys, head, group);
            }
            __syncwarp();
          }
        }
      });
    });
    if (kResident && lane() == 0) {
      mbarrier_wait(shared_address(&memory.key_empty[ring.slot]), ring.phase ^ 1);
      memory.no_keys[ring.slot] = 1;
      mbarrier_arrive(shared_address(&memory.key_loaded[ring.slot]));
    }
  }

  __device__ __forceinline__ void run() {
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      push_tiles();
    } else if (warp == 1) {
      load_keys_and_values();
    } else if (kResident) {
      permute_keys();
    }
  }
};

}  // namespace moba::cuda::sm90
