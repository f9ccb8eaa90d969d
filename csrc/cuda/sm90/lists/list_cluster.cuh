// Lists of few rows in one launch: a cluster of CTAs per key head, each with one part of its rows. Their counts go from
// CTA to CTA through distributed shared memory, and nothing is read twice.
#pragma once

#include "cuda/sm90/lists/list_sort.cuh"

namespace moba::cuda::sm90 {

constexpr int kClusterThreads = 1024;  // one row each
constexpr int kClusterWords = kClusterThreads / 32;
constexpr int kClusterCtas = 8;
constexpr int kClusterBlocks = 512;  // at most

// Shared memory for `window` blocks.
struct ClusterMemory {
  uint32_t* masks;   // [kClusterWords, window]: the rows that chose the block
  uint32_t* staged;  // [kClusterThreads * kStagedSlots]: see Window
  int32_t* rows;     // [window]: how many those are
  int32_t* local;    // [window]: index of the first of them among this CTA's entries, sorted
  int32_t* shift;    // [window]: from such an index to one in the entries
  uint16_t* before;  // [kClusterWords / kGroup, window]: rows in earlier groups

  __device__ __forceinline__ ClusterMemory(uint32_t* memory, int window)
      : masks(memory),
        staged(masks + kClusterWords * window),
        rows(reinterpret_cast<int32_t*>(staged + kClusterThreads * kStagedSlots)),
        local(rows + window),
        shift(local + window),
        before(reinterpret_cast<uint16_t*>(shift + window)) {}

  static int bytes(int window) {
    return window * (4 * (kClusterWords + 3) + 2 * kClusterWords / kGroup) + 4 * kClusterThreads * kStagedSlots;
  }
};

// head_parts: of a head; those of all heads of a group are at most kClusterCtas.
template <int kSlots>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_kernel(const __grid_constant__ PastListsParams p, int head_parts, int window) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(16) uint32_t dynamic_memory[];
  __shared__ Sums warps[kClusterWords + 1];
  const ClusterMemory memory(dynamic_memory, window);
  for (int i = threadIdx.x; i < kClusterWords * window / 4; i += kClusterThreads) {
    reinterpret_cast<uint4*>(memory.masks)[i] = make_uint4(0, 0, 0, 0);
  }
  const Sequences sequences(p.shape);
  const int thread = threadIdx.x, word = thread / 32, group_begin = word / kGroup * kGroup;
  const int rank = blockIdx.x % kClusterCtas, unit = blockIdx.x / kClusterCtas, head = rank / head_parts;
  const int heads_k = static_cast<int>(p.shape.heads_k), unit_k = static_cast<int>(p.lists.units_k.begin) + unit;
  const int group = static_cast<int>(p.shape.heads_per_key_head()), slots = static_cast<int>(p.shape.slots);
  const int blocks = static_cast<int>(p.shape.blocks());
  const int first_row = rank % head_parts * kClusterThreads, row = first_row + thread;
  const bool exists = head < group && row < sequences.rows;
  const int32_t* route = static_cast<const int32_t*>(p.route.data) + unit_k / heads_k * p.route.group +
                         (unit_k % heads_k * group + head) * p.route.head;
  uint32_t* entries = p.lists.entries + unit * capacity(p.shape);
  const bool vectors = slots % 4 == 0 && p.route.row % 4 == 0 && reinterpret_cast<uintptr_t>(route) % 16 == 0;
  wait_for_earlier();
  let_next_start();

  Slots<kSlots> own;
  own.load(route + row * p.route.row, slots, exists, vectors);
  const PastBlocks past = exists ? sequences.past_of(row) : PastBlocks{0, 0, false};
  __syncthreads();
  const uint32_t bit = 1u << thread % 32;
  int chosen[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int32_t block = own.value[i];
    chosen[i] = block >= 0 && block < past.count && past.first + block < blocks ? past.first + block : -1;
  }
  const uint32_t marked = mark(memory.masks + word * window, chosen);
  __syncthreads();
  int32_t rows = 0;  // of this CTA that chose this thread's block
  if (thread < window) {
#pragma unroll
    for (int i = 0; i < kClusterWords; ++i) {
      if (i % kGroup == 0) memory.before[i / kGroup * window + thread] = static_cast<uint16_t>(rows);
      rows += __popc(memory.masks[i * window + thread]);
    }
    memory.rows[thread] = rows;
  }
  cluster_sync();
  int32_t before = 0, length = 0;
  if (thread < window) {
#pragma unroll
    for (int cta = 0; cta < kClusterCtas; ++cta) {
      const int32_t others = cluster_load(shared_address(&memory.rows[thread]), cta);
      length += others;
      if (cta < rank) before += others;
    }
  }
  cluster_arrive();
  Sums total, own_total;
  const Sums list = of_list(length, tiles_together(p.shape)), lists = scan_cta<kClusterWords>(list, warps, total);
  const Sums own_lists = scan_cta<kClusterWords>({rows, 0}, warps, own_total);
  const int32_t begin = lists.entries - list.entries;
  if (thread < window) {
    memory.local[thread] = own_lists.entries - rows;
    memory.shift[thread] = begin + before - (own_lists.entries - rows);
  }
  if (rank == 0 && thread <= blocks) {
    const int64_t at = static_cast<int64_t>(unit) * (blocks + 1) + thread;
    p.lists.list_begin[at] = thread < blocks ? begin : total.entries;
    p.lists.tile_begin[at] = thread < blocks ? lists.tiles - list.tiles : total.tiles;
    // The tickets of launch_past.
    if (unit == 0 && thread < 2 && blocks > 1) p.lists.counts[thread] = 0;
  }
  __syncthreads();
  bool current = false;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int32_t block = own.value[i];
    int32_t result = kUnused;
    if (marked >> i & 1) {
      const int at = past.first + block;
      int32_t index = memory.local[at] + memory.before[word / kGroup * window + at];
      for (int j = group_begin; j < word; ++j) index += __popc(memory.masks[j * window + at]);
      index += __popc(memory.masks[word * window + at] & (bit - 1));
      memory.staged[index] = static_cast<uint32_t>(at) << 16 | thread;
      result = index + memory.shift[at];
    } else if (block == past.count && past.exists && !current) {
      current = true;
      result = kCurrent;
    }
    own.value[i] = result;
  }
  if (exists) {
    own.store(p.lists.positions + (static_cast<int64_t>(unit) * group + head) * p.shape.entries() +
                  static_cast<int64_t>(row) * slots,
              slots, vectors);
  }
  __syncthreads();
  const uint32_t first = static_cast<uint32_t>(head) << kRowBits | static_cast<uint32_t>(first_row);
  for (int i = thread; i < own_total.entries; i += kClusterThreads) {
    const uint32_t staged = memory.staged[i];
    entries[i + memory.shift[staged >> 16]] = first + (staged & 0xffff);
  }
  __syncwarp();
  cluster_wait();  // the others' memory stays until all have read it
#endif
}

}  // namespace moba::cuda::sm90
