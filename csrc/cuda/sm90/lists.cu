// Routing lists of past blocks by a counting sort in three launches: count, scan, place. A row chooses a block at most
// once, so that the rows of a part that chose a block are a bit mask, and the place of a row in the list is a count of
// lower bits: the order never depends on time.
#include <algorithm>

#include "cuda/sm90/dependent.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/sequences.cuh"
#include "cuda/sm90/ptx.cuh"

namespace moba::cuda::sm90 {
namespace {

constexpr int kThreads = 512;  // one row each
constexpr int kWords = kThreads / 32;
constexpr int kGroup = 4;        // words with one count of the rows before them
constexpr int kWindow = kThreads;  // blocks whose masks are in shared memory at a time
constexpr int kStagedSlots = 8;  // rows of up to so many slots are sorted in shared memory before they are written
constexpr int kScanThreads = 1024;
constexpr int kScanCtas = 8;  // of a key head: a cluster
constexpr unsigned kAll = 0xffffffffu;

// Arguments in 32 bits.
struct Sort {
  int chunks, chunks_per_head, chunk_rows, window;
};

// Shared memory of the count and place kernels, for `window` blocks. A part is kThreads rows.
struct Window {
  uint32_t* masks;   // [kWords, window]: of the rows of this part, those that chose the block
  int32_t* start;    // [window]: index of the first row of this part in the entries
  int32_t* next;     // [window]: index of the first row of the next part
  int32_t* shift;    // [window]: from an index among this part's rows to one in the entries
  uint16_t* before;  // [kWords / kGroup, window]: rows in earlier groups
  uint32_t* staged;  // [kThreads * kStagedSlots]: block of the window above, row of the part below
  int size;

  __device__ __forceinline__ Window(uint32_t* memory, int window)
      : masks(memory),
        start(reinterpret_cast<int32_t*>(masks + kWords * window)),
        next(start + window),
        shift(next + window),
        before(reinterpret_cast<uint16_t*>(shift + window)),
        staged(reinterpret_cast<uint32_t*>(before + kWords / kGroup * window)),
        size(window) {}

  static int bytes(int window, bool staged) {
    return window * (4 * (kWords + 3) + 2 * kWords / kGroup) + (staged ? 4 * kThreads * kStagedSlots : 0);
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

// Marks this thread's row in the masks of the blocks it chose. A slot that repeats an earlier one finds its bit set.
__device__ __forceinline__ bool mark(const Window& window, int block) {
  const uint32_t bit = 1u << threadIdx.x % 32;
  return !(atomicOr(&window.masks[threadIdx.x / 32 * window.size + block], bit) & bit);
}

// How many rows of the part before this thread's chose the block.
__device__ __forceinline__ int32_t earlier_rows(const Window& window, int block) {
  const int word = threadIdx.x / 32, group = word / kGroup;
  int32_t rows = window.before[group * window.size + block];
  for (int i = group * kGroup; i < word; ++i) rows += __popc(window.masks[i * window.size + block]);
  return rows + __popc(window.masks[word * window.size + block] & ((1u << threadIdx.x % 32) - 1));
}

__device__ __forceinline__ void clear_masks(const Window& window, int used) {
  for (int i = threadIdx.x; i < used; i += kThreads) {
#pragma unroll 8
    for (int word = 0; word < kWords; ++word) window.masks[word * window.size + i] = 0;
  }
}

struct Sums {
  int32_t entries, tiles;
};
__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.entries + b.entries, a.tiles + b.tiles};
}
__device__ __forceinline__ Sums shift_up(const Sums& sums, int offset) {
  const Sums lower{__shfl_up_sync(kAll, sums.entries, offset), __shfl_up_sync(kAll, sums.tiles, offset)};
  return static_cast<int>(threadIdx.x % 32) >= offset ? lower : Sums{0, 0};
}
__device__ __forceinline__ Sums scan_warp(Sums sums) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) sums = sums + shift_up(sums, offset);
  return sums;
}
__device__ __forceinline__ Sums of_list(int32_t length) {
  return {length, (length + static_cast<int>(kListTile) - 1) / static_cast<int>(kListTile)};
}

// The sum over this thread and those before it; `total` over all.
template <int kWarps>
__device__ __forceinline__ Sums scan_cta(Sums sums, Sums (&warps)[kWarps + 1], Sums& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums = scan_warp(sums);
  if (lane == 31) warps[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    const Sums own = lane < kWarps ? warps[lane] : Sums{0, 0}, all = scan_warp(own);
    if (lane < kWarps) warps[lane] = {all.entries - own.entries, all.tiles - own.tiles};
    if (lane == 31) warps[kWarps] = all;
  }
  __syncthreads();
  sums = sums + warps[warp];
  total = warps[kWarps];
  __syncthreads();
  return sums;
}

// kSlots: see Slots; 0: any number, looked up twice.
template <int kSlots, bool kPlace>
__global__ void __launch_bounds__(kThreads, 2) sort_kernel(const __grid_constant__ PastListsParams p, const Sort sort) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kStaged = kPlace && kSlots > 0 && kSlots <= kStagedSlots;
  extern __shared__ __align__(16) uint32_t memory[];
  __shared__ Sums warps[kWords + 1];
  wait_for_earlier();
  let_next_start();
  const Window window(memory, sort.window);
  const Sequences sequences(p.shape);
  const Chunk chunk(p, sort, sequences);
  const int slots = static_cast<int>(p.shape.slots), blocks = static_cast<int>(p.shape.blocks());
  const bool vectors = slots % 4 == 0 && p.route.row % 4 == 0 && reinterpret_cast<uintptr_t>(chunk.route) % 16 == 0;
  if (!kPlace) {
    for (int i = threadIdx.x; i < blocks; i += kThreads) {
      if (i < chunk.first_block || i >= chunk.end_block) chunk.counts[i] = 0;
    }
  }
  bool first_window = true;
  for (int begin = chunk.first_block; first_window || begin < chunk.end_block; begin += window.size) {
    const int used = max(0, min(window.size, chunk.end_block - begin));
    if (static_cast<int>(threadIdx.x) < used) {
      const int block = begin + static_cast<int>(threadIdx.x);
      window.next[threadIdx.x] = kPlace ? chunk.list_begin[block] + chunk.counts[block] : 0;
    }
    clear_masks(window, used);
    for (int row_begin = chunk.row_begin; row_begin < chunk.row_end; row_begin += kThreads) {
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
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const int at = in_window(own.value[i]);
          if (at >= 0 && mark(window, at)) marked |= 1u << i;
        }
      } else {
        for (int i = 0; exists && i < slots; ++i) {
          const int32_t block = __ldg(route + i);
          const int at = in_window(block);
          int32_t result = kUnused;
          if (at >= 0) {
            if (mark(window, at)) result = 0;
          } else if (block == past.count && past.exists && !current) {
            current = true;
            result = kCurrent;
          }
          if (kPlace && (at >= 0 || first_window)) positions[i] = result;
        }
      }
      __syncthreads();
      int32_t rows = 0, start = 0;  // of the part and this thread's block
      if (static_cast<int>(threadIdx.x) < used) {
#pragma unroll 8
        for (int word = 0; word < kWords; ++word) {
          if (kPlace && word % kGroup == 0) {
            window.before[word / kGroup * window.size + threadIdx.x] = static_cast<uint16_t>(rows);
          }
          rows += __popc(window.masks[word * window.size + threadIdx.x]);
          if (!kPlace) window.masks[word * window.size + threadIdx.x] = 0;
        }
        start = window.next[threadIdx.x];
        window.next[threadIdx.x] = start + rows;
        window.start[threadIdx.x] = start;
      }
      if (!kPlace) continue;
      Sums total{0, 0};
      if constexpr (kStaged) {
        const Sums sum = scan_cta<kWords>({rows, 0}, warps, total);
        if (static_cast<int>(threadIdx.x) < used) window.shift[threadIdx.x] = start - (sum.entries - rows);
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
        for (int i = threadIdx.x; i < total.entries; i += kThreads) {
          const uint32_t staged = window.staged[i];
          chunk.entries[i + window.shift[staged >> 16]] = first + (staged & 0xffff);
        }
      }
      clear_masks(window, used);
    }
    __syncthreads();
    if (!kPlace && static_cast<int>(threadIdx.x) < used) chunk.counts[begin + threadIdx.x] = window.next[threadIdx.x];
    __syncthreads();
    first_window = false;
  }
#endif
}

// A cluster per key head, each of its CTAs with a range of blocks. Per block, counts become the number of entries in
// earlier chunks; then the lengths of the lists become where they begin, in entries and in tiles.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ PastListsParams p, int chunks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  wait_for_earlier();
  let_next_start();
  constexpr int kAtOnce = 8;  // loads under way
  __shared__ int32_t groups[32][33];
  __shared__ Sums warps[kScanThreads / 32 + 1];
  __shared__ Sums range_sums;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rank = blockIdx.x % kScanCtas, local = blockIdx.x / kScanCtas;
  const int blocks = static_cast<int>(p.shape.blocks());
  const int range = (blocks + 32 * kScanCtas - 1) / (32 * kScanCtas) * 32;
  const int begin = min(rank * range, blocks), end = min(begin + range, blocks);
  int32_t* counts = p.lists.counts + static_cast<int64_t>(local) * chunks * blocks;
  int32_t* list_begin = p.lists.list_begin + static_cast<int64_t>(local) * (blocks + 1);
  int32_t* tile_begin = p.lists.tile_begin + static_cast<int64_t>(local) * (blocks + 1);

  const int group = (chunks + 31) / 32;
  const int chunk_begin = min(warp * group, chunks), chunk_end = min(chunk_begin + group, chunks);
  for (int block0 = begin; block0 < end; block0 += 32) {
    int32_t* column = counts + block0 + lane;
    const bool exists = block0 + lane < end;
    int32_t count[kAtOnce], sum = 0;
    const auto load = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        count[i] = exists && chunk + i < chunk_end ? column[static_cast<int64_t>(chunk + i) * blocks] : 0;
      }
    };
    for (int chunk = chunk_begin; chunk < chunk_end; chunk += kAtOnce) {
      load(chunk);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += count[i];
    }
    groups[warp][lane] = sum;
    __syncthreads();
    const int32_t own = groups[lane][warp];
    int32_t all = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t lower = __shfl_up_sync(kAll, all, offset);
      if (lane >= offset) all += lower;
    }
    groups[lane][warp] = all - own;
    if (lane == 31 && block0 + warp < end) list_begin[block0 + warp] = all;
    __syncthreads();
    int32_t before = groups[warp][lane];
    for (int chunk = chunk_begin; chunk < chunk_end; chunk += kAtOnce) {
      if (group > kAtOnce) load(chunk);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (exists && chunk + i < chunk_end) column[static_cast<int64_t>(chunk + i) * blocks] = before;
        before += count[i];
      }
    }
    __syncthreads();
  }

  Sums before{0, 0}, total{0, 0};
  for (int block = begin + threadIdx.x; block < end; block += kScanThreads) before = before + of_list(list_begin[block]);
  scan_cta<kScanThreads / 32>(before, warps, total);
  if (threadIdx.x == 0) range_sums = total;
  cluster_sync();
  before = {0, 0};
  for (int i = 0; i < rank; ++i) {
    before.entries += cluster_load(shared_address(&range_sums.entries), i);
    before.tiles += cluster_load(shared_address(&range_sums.tiles), i);
  }
  cluster_sync();  // the others' memory stays until all have read it
  for (int block0 = begin; block0 < end; block0 += kScanThreads) {
    const int block = block0 + threadIdx.x;
    const Sums own = of_list(block < end ? list_begin[block] : 0);
    const Sums all = before + scan_cta<kScanThreads / 32>(own, warps, total);
    if (block < end) {
      list_begin[block] = all.entries - own.entries;
      tile_begin[block] = all.tiles - own.tiles;
    }
    before = before + total;
  }
  if (rank == kScanCtas - 1 && threadIdx.x == 0) {
    list_begin[blocks] = before.entries;
    tile_begin[blocks] = before.tiles;
  }
#endif
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <bool kPlace>
cudaError_t launch_sort(const PastListsParams& p, const Sort& sort, cudaStream_t stream) {
  const int64_t slots = p.shape.slots;
  const auto kernel = slots <= 4              ? sort_kernel<4, kPlace>
                      : slots <= kStagedSlots ? sort_kernel<kStagedSlots, kPlace>
                                              : sort_kernel<0, kPlace>;
  const int bytes = Window::bytes(sort.window, kPlace && slots <= kStagedSlots);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t grid = p.lists.units_k.count * sort.chunks;
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(kernel, {static_cast<unsigned>(grid), kThreads, bytes}, stream, p, sort);
}

}  // namespace

// Where there are thousands of blocks, chunks of several parts: else the counts would take more than the entries.
int64_t list_chunks(const Shape& shape) {
  const int64_t parts = ceil_divide(shape.rows, kThreads), together = std::max<int64_t>(1, shape.blocks() / kThreads);
  return ceil_divide(parts, together) * shape.heads_per_key_head();
}

cudaError_t launch_past_lists(const PastListsParams& p, cudaStream_t stream) {
  const int64_t per_head = p.lists.chunks / p.shape.heads_per_key_head();
  const Sort sort{
      .chunks = static_cast<int>(p.lists.chunks),
      .chunks_per_head = static_cast<int>(per_head),
      .chunk_rows = static_cast<int>(ceil_divide(ceil_divide(p.shape.rows, kThreads), per_head) * kThreads),
      .window = static_cast<int>(std::min<int64_t>(ceil_divide(p.shape.blocks(), 32) * 32, kWindow)),
  };
  cudaError_t status = launch_sort<false>(p, sort, stream);
  if (status != cudaSuccess) return status;
  const unsigned scan_grid = static_cast<unsigned>(p.lists.units_k.count * kScanCtas);
  status = launch_dependent(scan_kernel, {scan_grid, kScanThreads, 0, kScanCtas}, stream, p, sort.chunks);
  return status == cudaSuccess ? launch_sort<true>(p, sort, stream) : status;
}

}  // namespace moba::cuda::sm90
