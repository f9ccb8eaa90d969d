// The kernel that counts, and later places, the rows of a chunk by the blocks they chose. A row chooses a block at most
// once, so that the rows of a part that chose a block are a bit mask, and the place of a row in the list is a count of
// lower bits: the order never depends on time.
#pragma once

#include "cuda/sm90/lists/list_scan.cuh"
#include "cuda/sm90/sequences.cuh"

namespace moba::cuda::sm90 {

constexpr int kSortThreads = 512;  // one row each
constexpr int kSortWords = kSortThreads / 32;
constexpr int kGroup = 4;                            // words with one count of the rows before them
constexpr int kMaxEach = 2;                          // blocks of a thread, where it does not look at rows
constexpr int kMaxWindow = kMaxEach * kSortThreads;  // blocks whose masks are in shared memory at a time
constexpr int kStagedSlots = 8;  // rows of up to so many slots are sorted in shared memory before they are written

// Arguments in 32 bits.
struct Sort {
  int chunks, chunks_per_head, chunk_rows, window;
};

// Shared memory of the count and place kernels, for `window` blocks. A part is kSortThreads rows.
struct Window {
  uint32_t* masks;   // [kSortWords, window]: of the rows of this part, those that chose the block
  int32_t* start;    // [window]: index of the first row of this part in the entries
  int32_t* next;     // [window]: index of the first row of the next part
  int32_t* shift;    // [window]: from an index among this part's rows to one in the entries
  uint16_t* before;  // [kSortWords / kGroup, window]: rows in earlier groups
  uint32_t* staged;  // [kSortThreads * kStagedSlots]: block of the window above, row of the part below
  int size;

  __device__ __forceinline__ Window(uint32_t* memory, int window)
      : masks(memory),
        start(reinterpret_cast<int32_t*>(masks + kSortWords * window)),
        next(start + window),
        shift(next + window),
        before(reinterpret_cast<uint16_t*>(shift + window)),
        staged(reinterpret_cast<uint32_t*>(before + kSortWords / kGroup * window)),
        size(window) {}

  static int bytes(int window, bool staged) {
    return window * (4 * (kSortWords + 3) + 2 * kSortWords / kGroup) + (staged ? 4 * kSortThreads * kStagedSlots : 0);
  }
};

// The part of a head's rows that a CTA sorts.
struct Chunk {
  const int32_t* route;  // of the head
  int32_t* positions;    // of the head
  uint32_t* entries;     // of the key head
  int32_t* counts;       // of the chunk
  const int32_t* list_begin;
  int row_begin, row_end;
  int first_block, end_block;  // what its rows can choose
  uint32_t head;               // in the group

  __device__ Chunk(const PastListsParams& p, const Sort& sort, const Sequences& sequences) {
    const int local = blockIdx.x / sort.chunks, number = blockIdx.x % sort.chunks;
    const int heads_k = static_cast<int>(p.shape.heads_k), unit_k = static_cast<int>(p.lists.units_k.begin) + local;
    const int group = static_cast<int>(p.shape.heads_per_key_head());
    const int rows = static_cast<int>(p.shape.rows), blocks = static_cast<int>(p.shape.blocks());
    head = number / sort.chunks_per_head;
    route = static_cast<const int32_t*>(p.route.data) + unit_k / heads_k * p.route.group +
            (unit_k % heads_k * group + static_cast<int>(head)) * p.route.head;
    positions = p.lists.positions + (static_cast<int64_t>(local) * group + head) * p.shape.entries();
    entries = p.lists.entries + local * capacity(p.shape);
    counts = p.lists.counts + static_cast<int64_t>(blockIdx.x) * blocks;
    list_begin = p.lists.list_begin + static_cast<int64_t>(local) * (blocks + 1);
    const int64_t begin = static_cast<int64_t>(number % sort.chunks_per_head) * sort.chunk_rows;
    row_begin = static_cast<int>(min(begin, static_cast<int64_t>(rows)));
    row_end = static_cast<int>(min(begin + sort.chunk_rows, static_cast<int64_t>(rows)));
    first_block = end_block = 0;
    if (row_begin < row_end) {
      first_block = sequences.past_of(row_begin).first;
      const PastBlocks last = sequences.past_of(row_end - 1);
      end_block = min(last.first + last.count, blocks);
    }
  }
};

// The slots of one row; kSlots > 0: at most so many, kept in registers.
template <int kSlots>
struct Slots {
  int32_t value[kSlots];

  __device__ __forceinline__ void load(const int32_t* from, int slots, bool exists, bool vectors) {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kSlots; i += 4) {
        int4 four = make_int4(-1, -1, -1, -1);
        if (exists && i < slots) four = __ldg(reinterpret_cast<const int4*>(from + i));
        value[i] = four.x;
        value[i + 1] = four.y;
        value[i + 2] = four.z;
        value[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) value[i] = exists && i < slots ? __ldg(from + i) : -1;
    }
  }
  __device__ __forceinline__ void store(int32_t* to, int slots, bool vectors) const {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kSlots; i += 4) {
        if (i < slots) *reinterpret_cast<int4*>(to + i) = make_int4(value[i], value[i + 1], value[i + 2], value[i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (i < slots) to[i] = value[i];
      }
    }
  }
};
template <>
struct Slots<0> {};

__device__ __forceinline__ void load_blocks(uint32_t (&masks)[1], const uint32_t* from) { masks[0] = *from; }
__device__ __forceinline__ void load_blocks(uint32_t (&masks)[2], const uint32_t* from) {
  const uint2 two = *reinterpret_cast<const uint2*>(from);
  masks[0] = two.x;
  masks[1] = two.y;
}

// Marks this thread's row in the masks of the blocks that it chose, `words` of its warp; negative: none. Bit i of the
// result: no earlier slot of the row is the same as slot i. A block that a whole warp chose in one slot, as all rows
// choose a sink, is marked by one lane: 32 would wait for each other.
template <int kSlots>
__device__ __forceinline__ uint32_t mark(uint32_t* words, const int (&chosen)[kSlots]) {
  const uint32_t bit = 1u << threadIdx.x % 32;
  uint32_t before[kSlots];  // looked at later: no slot waits for the one before
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    before[i] = kAll;
    int alike;
    __match_all_sync(kAll, chosen[i], &alike);
    if (chosen[i] < 0) continue;
    if (!alike) {
      before[i] = atomicOr(&words[chosen[i]], bit);
    } else {  // and so are all lanes here
      __syncwarp();
      if (bit == 1) before[i] = atomicOr(&words[chosen[i]], kAll);
      before[i] = __shfl_sync(kAll, before[i], 0);
      __syncwarp();
    }
  }
  uint32_t marked = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (!(before[i] & bit)) marked |= 1u << i;
  }
  return marked;
}

// How many rows of the part before this thread's chose the block.
__device__ __forceinline__ int32_t earlier_rows(const Window& window, int block) {
  const int word = threadIdx.x / 32, group = word / kGroup;
  int32_t rows = window.before[group * window.size + block];
  for (int i = group * kGroup; i < word; ++i) rows += __popc(window.masks[i * window.size + block]);
  return rows + __popc(window.masks[word * window.size + block] & ((1u << threadIdx.x % 32) - 1));
}

__device__ __forceinline__ void clear_masks(const Window& window, int used) {
  for (int i = threadIdx.x; i < used; i += kSortThreads) {
#pragma unroll 8
    for (int word = 0; word < kSortWords; ++word) window.masks[word * window.size + i] = 0;
  }
}

// kSlots: see Slots; 0: any number, looked up twice. kEach: blocks of a thread; window <= kEach * kSortThreads.
template <int kSlots, bool kPlace, int kEach>
__global__ void __launch_bounds__(kSortThreads, kPlace || kEach > 1 ? 2 : 3)
    sort_kernel(const __grid_constant__ PastListsParams p, const Sort sort) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kStaged = kPlace && kSlots > 0 && kSlots <= kStagedSlots;
  extern __shared__ __align__(16) uint32_t memory[];
  __shared__ Sums warps[kSortWords + 1];
  wait_for_earlier();
  let_next_start();
  const Window window(memory, sort.window);
  uint32_t* const words = window.masks + threadIdx.x / 32 * window.size;  // of the warp
  const Sequences sequences(p.shape);
  const Chunk chunk(p, sort, sequences);
  const int slots = static_cast<int>(p.shape.slots), blocks = static_cast<int>(p.shape.blocks());
  const bool vectors = slots % 4 == 0 && p.route.row % 4 == 0 && reinterpret_cast<uintptr_t>(chunk.route) % 16 == 0;
  if (!kPlace) {
    for (int i = threadIdx.x; i < blocks; i += kSortThreads) {
      if (i < chunk.first_block || i >= chunk.end_block) chunk.counts[i] = 0;
    }
  }
  bool first_window = true;
  for (int begin = chunk.first_block; first_window || begin < chunk.end_block; begin += window.size) {
    const int used = max(0, min(window.size, chunk.end_block - begin));
    for (int i = threadIdx.x; i < used; i += kSortThreads) {
      window.next[i] = kPlace ? chunk.list_begin[begin + i] + chunk.counts[begin + i] : 0;
    }
    const int cleared = (used + kEach - 1) / kEach * kEach;
    clear_masks(window, cleared);
    for (int row_begin = chunk.row_begin; row_begin < chunk.row_end; row_begin += kSortThreads) {
      const int row = row_begin + threadIdx.x;
      const bool exists = row < chunk.row_end;
      const PastBlocks past = exists ? sequences.past_of(row) : PastBlocks{0, 0, false};
      const int32_t* route = chunk.route + row * p.route.row;
      int32_t* positions = chunk.positions + static_cast<int64_t>(row) * slots;
      const uint32_t entry = chunk.head << kRowBits | static_cast<uint32_t>(row);
      // A block of this window, or less than 0.
      const auto in_window = [&](int32_t block) {
        const int at = past.first + block - begin;
        return block >= 0 && block < past.count && at >= 0 && at < used ? at : -1;
      };
      Slots<kSlots> own;
      uint32_t marked = 0;
      bool current = false;
      if constexpr (kSlots > 0) own.load(route, slots, exists, vectors);
      __syncthreads();  // masks are clear
      if constexpr (kSlots > 0) {
        int chosen[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) chosen[i] = in_window(own.value[i]);
        marked = mark(words, chosen);
      } else {
        for (int i = 0; i < slots; ++i) {
          const int32_t block = exists ? __ldg(route + i) : -1;
          const int at = in_window(block);
          int32_t result = mark(words, {at}) ? 0 : kUnused;
          if (at < 0 && block == past.count && past.exists && !current) {
            current = true;
            result = kCurrent;
          }
          if (kPlace && exists && (at >= 0 || first_window)) positions[i] = result;
        }
      }
      __syncthreads();
      // Of the part and this thread's blocks, which are neighbours.
      const int own_block = threadIdx.x * kEach;
      int32_t rows[kEach] = {}, start[kEach] = {};
      if (own_block < used) {
#pragma unroll 8
        for (int word = 0; word < kSortWords; ++word) {
          uint32_t masks[kEach];
          load_blocks(masks, window.masks + word * window.size + own_block);
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            if (kPlace && word % kGroup == 0) {
              window.before[word / kGroup * window.size + own_block + i] = static_cast<uint16_t>(rows[i]);
            }
            rows[i] += __popc(masks[i]);
            if (!kPlace) window.masks[word * window.size + own_block + i] = 0;
          }
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          start[i] = window.next[own_block + i];
          window.next[own_block + i] = start[i] + rows[i];
          window.start[own_block + i] = start[i];
        }
      }
      if (!kPlace) continue;
      Sums total{0, 0};
      if constexpr (kStaged) {
        int32_t own_rows = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) own_rows += rows[i];
        int32_t index = scan_cta<kSortWords>({own_rows, 0}, warps, total).entries - own_rows;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if (own_block < used) window.shift[own_block + i] = start[i] - index;
          index += rows[i];
        }
      }
      __syncthreads();
      if constexpr (kSlots > 0) {
        uint32_t others = 0;
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const int32_t block = own.value[i];
          const int at = in_window(block);
          int32_t result = kUnused;
          if (marked >> i & 1) {
            result = window.start[at] + earlier_rows(window, at);
            if (kStaged) {
              window.staged[result - window.shift[at]] = static_cast<uint32_t>(at) << 16 | threadIdx.x;
            } else {
              chunk.entries[result] = entry;
            }
          } else if (at < 0) {
            others |= 1u << i;
            if (block == past.count && past.exists && !current) {
              current = true;
              result = kCurrent;
            }
          }
          own.value[i] = result;
        }
        if (first_window) {
          if (exists) own.store(positions, slots, vectors);
        } else {
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            if (!(others >> i & 1) && i < slots) positions[i] = own.value[i];
          }
        }
      } else {
        for (int i = 0; exists && i < slots; ++i) {
          const int at = in_window(__ldg(route + i));
          if (at >= 0 && positions[i] == 0) {
            const int32_t result = window.start[at] + earlier_rows(window, at);
            positions[i] = result;
            chunk.entries[result] = entry;
          }
        }
      }
      __syncthreads();
      if (kStaged) {
        const uint32_t first = chunk.head << kRowBits | static_cast<uint32_t>(row_begin);
        for (int i = threadIdx.x; i < total.entries; i += kSortThreads) {
          const uint32_t staged = window.staged[i];
          chunk.entries[i + window.shift[staged >> 16]] = first + (staged & 0xffff);
        }
      }
      clear_masks(window, cleared);
    }
    __syncthreads();
    for (int i = threadIdx.x; !kPlace && i < used; i += kSortThreads) chunk.counts[begin + i] = window.next[i];
    __syncthreads();
    first_window = false;
  }
  // Nobody else reads them: from here on they are the tickets of launch_past.
  if (kPlace && blockIdx.x == 0 && threadIdx.x < 2 && blocks > 1) chunk.counts[threadIdx.x] = 0;
#endif
}

}  // namespace moba::cuda::sm90
