// Gate scores on the tensor cores and the best blocks of every query: one producer warp loads queries and block means
// by TMA; each consumer warpgroup multiplies 64 queries with 128 means at a time, from the latest block down, and keeps
// the best of them (select.cuh). While one consumer selects, the other multiplies.
#pragma once

#include "cuda/portable/unit.cuh"
#include "cuda/sm90/dependent.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/route/gate.h"
#include "cuda/sm90/route/select.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace moba::cuda::sm90 {

template <class T, int kHeadDim, int kKept>
struct GateProducer {
  using P = GatePlan<kHeadDim, kKept>;

  const GateParams& p;
  const GateSchedule& schedule;
  const CUtensorMap* map_q;
  const CUtensorMap* map_means;
  typename P::Memory& memory;

  Ring<P::kSlots> ring;

  // Leaves the slot to be filled.
  __device__ __forceinline__ uint32_t next_slot() {
    mbarrier_wait(shared_address(&memory.empty[ring.slot]), ring.phase ^ 1);
    return shared_address(memory.slots[ring.slot]);
  }

  uint32_t phase = 0;  // of the queries
  __device__ __forceinline__ void load_queries_separate(int consumer, const GateTile& tile, int row, int head, int group) {
    const uint32_t full = shared_address(&memory.query_full[consumer]);
    mbarrier_wait(shared_address(&memory.query_empty[consumer]), phase ^ 1);
    memory.tiles[consumer] = tile;
    memory.tiles[consumer].phase = phase ^ 1;
    if (tile.rows <= 0 || tile.steps <= 0) {
      mbarrier_arrive(full);
      return;
    }
    mbarrier_arrive_expect_tx(full, P::kQueryBytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(memory.queries[consumer]) + panel * (kGateQueries * kPanelRowBytes), map_q, full,
                  panel * kPanelColumns, row, head, group);
    }
  }
  __device__ __forceinline__ void load_queries(const GateTile& tile, int row, int head, int group) {
    const uint32_t to = next_slot(), full = shared_address(&memory.full[ring.slot]);
    memory.tiles[ring.slot] = tile;
    ring.advance();
    if (tile.rows <= 0 || tile.steps <= 0) {
      mbarrier_arrive(full);
      return;
    }
    mbarrier_arrive_expect_tx(full, P::kQueryBytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(to + panel * (kGateQueries * kPanelRowBytes), map_q, full, panel * kPanelColumns, row, head, group);
    }
  }

  __device__ __forceinline__ void load_means(int row) {
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      const uint32_t to = next_slot(), full = shared_address(&memory.full[ring.slot]);
      ring.advance();
      mbarrier_arrive_expect_tx(full, P::kSlotBytes);
      tma_load_4d(to, map_means, full, panel * kPanelColumns, row, 0, 0);
    }
  }

  // One thread.
  __device__ __forceinline__ void run() {
    const Shape& shape = p.shape;
    const int size = static_cast<int>(shape.block_size), heads = static_cast<int>(shape.heads);
    for (int index = blockIdx.x; index < schedule.tiles; index += gridDim.x) {
      const int turn = schedule.units.divide(index), unit = index - turn * static_cast<int>(schedule.units.divisor);
      const int number = schedule.unit_tiles - 1 - turn;
      Sequence sequence{0, 0, shape.rows, 0, shape.keys};
      int offset = number * P::kTileRows, first_block = 0;
      if (shape.cu_seqlens_q != nullptr) {
        sequence = sequence_of_part(shape, shape.cu_seqlens_q, shape.rows, number, P::kTileRows);
        offset -= static_cast<int>(first_part(sequence.row_begin, sequence.index, P::kTileRows)) * P::kTileRows;
        first_block = static_cast<int>(first_part(sequence.key_begin, sequence.index, size));
      }
      if (offset < 0 || offset >= sequence.rows) continue;
      const int rows = min(P::kTileRows, static_cast<int>(sequence.rows) - offset);
      const int row = static_cast<int>(sequence.row_begin) + offset;
      const int position = static_cast<int>(sequence.keys - sequence.rows) + offset, last = position + rows - 1;
      const int steps = last < 0 ? 0 : (schedule.block_size.divide(last) + kGateMeans - 1) / kGateMeans;
      const int group = schedule.heads.divide(unit), head = unit - group * heads;
      const int64_t route = group * p.route.group + head * p.route.head + row * p.route.row;
#pragma unroll 1
      for (int consumer = 0; consumer < P::kConsumers; ++consumer) {
        const int skipped = consumer * kGateQueries;
        const GateTile tile{route + skipped * p.route.row, rows - skipped, position + skipped, steps};
        if (QSEP) load_queries_separate(consumer, tile, row + skipped, head, group);
        else load_queries(tile, row + skipped, head, group);
      }
      phase ^= 1;
      const int first = schedule.heads_per_key_head.divide(unit) * schedule.blocks + first_block;
      for (int step = steps - 1; step >= 0; --step) load_means(first + step * kGateMeans);
    }
    for (int consumer = 0; consumer < P::kConsumers; ++consumer) QSEP ? load_queries_separate(consumer, {0, 0, 0, -1}, 0, 0, 0) : load_queries({0, 0, 0, -1}, 0, 0, 0);
  }
};

__device__ __forceinline__ int consumer_of_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread / kWarpgroup;
}

template <class T, int kHeadDim, int kKept>
struct GateConsumer {
  using P = GatePlan<kHeadDim, kKept>;

  const GateParams& p;
  const GateSchedule& schedule;
  typename P::Memory& memory;

  uint32_t queries[kHeadDim / 16][4];
  float scores[64];
  Ring<P::kSlots> ring;

  // All lanes of the warp are done with the slot.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (lane_of_warp() == 0) mbarrier_arrive(shared_address(&memory.empty[ring.slot]));
    ring.advance();
  }

  // From the slots of a tile's queries, of which one is this consumer's. Returns the steps of the tile.
  __device__ __forceinline__ int take_queries(int first_row) {
    const int consumer = consumer_of_thread();
    const int lane = lane_of_warp();
    if constexpr (QSEP) {
      GateTile& mine = memory.warps[threadIdx.x / 32].tile;
      mbarrier_wait(shared_address(&memory.query_full[consumer]), mine.phase);
      __syncwarp();
      if (lane == 0) mine = memory.tiles[consumer];
      if (AREG) load_operand(shared_address(memory.queries[consumer]), lane, first_row);
      __syncwarp();
      if (AREG && lane == 0) mbarrier_arrive(shared_address(&memory.query_empty[consumer]));
      return mine.steps;
    } else {
#pragma unroll 1
    for (int i = 0; i < P::kConsumers; ++i) {
      mbarrier_wait(shared_address(&memory.full[ring.slot]), ring.phase);
      if (i == consumer) {
        if (lane == 0) memory.warps[threadIdx.x / 32].tile = memory.tiles[ring.slot];
        load_operand(shared_address(memory.slots[ring.slot]), lane, first_row);
      }
      release();
    }
    __syncwarp();
    return memory.warps[threadIdx.x / 32].tile.steps; }
  }
  __device__ __forceinline__ void load_operand(uint32_t from, int lane, int first_row) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      load_matrices(queries[k], from + k / 4 * (kGateQueries * kPanelRowBytes) +
                                    swizzled(first_row + lane % 16, k % 4 * 2 + lane / 16));
    }
  }

  // The blocks before the current ones of this lane's rows; 0 for rows that do not exist.
  __device__ __forceinline__ void current_blocks(int first_row, int (&current)[2]) {
    const GateTile& tile = memory.warps[threadIdx.x / 32].tile;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane_of_warp() / 4 + 8 * half, position = tile.position + row;
      current[half] = row >= tile.rows ? 0 : position < 0 ? -1 : schedule.block_size.divide(position);
    }
  }

  // Consumers multiply in turns, so that one multiplies while the others select.
  __device__ __forceinline__ void begin_turn() { named_barrier_sync(1 + consumer_of_thread(), 2 * kWarpgroup); }
  __device__ __forceinline__ void end_turn() {
    const int next = consumer_of_thread() + 1;
    named_barrier_arrive(next < P::kConsumers ? 1 + next : 1, 2 * kWarpgroup);
  }

  __device__ __forceinline__ void multiply(const uint32_t (&means)[P::kPanels]) {
#ifndef TURNS
#define TURNS 2
#endif
    constexpr int kProducts = kHeadDim / 16, kLast = TURNS == 2 ? kProducts / 4 : 0;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      if (AREG) {
        wgmma_registers_rows<T>(scores, queries[k], descriptor(means[k / 4] + k % 4 * 32, 16), k > 0);
      } else {
        const uint32_t from = shared_address(memory.queries[consumer_of_thread()]);
        wgmma_shared<T>(scores, descriptor(from + k / 4 * (kGateQueries * kPanelRowBytes) + k % 4 * 32, 16),
                        descriptor(means[k / 4] + k % 4 * 32, 16), k > 0);
      }
      if (kLast > 0 && k == kProducts - kLast - 1) wgmma_commit();
    }
    wgmma_commit();
    if (TURNS == 1) end_turn();
    if (TURNS == 2) {
      wgmma_wait<1>();
      end_turn();
    }
    wgmma_wait<0>();
    if (TURNS == 3) end_turn();
    settle(scores);
  }

  // Blocks from the current ones on are no candidates. `begin`: the first block of the step; nobody looks at parts from
  // block `end` on, and rows of a warp lie in two neighbouring blocks at most.
  __device__ __forceinline__ void mask(int first_row, int begin, int end) {
    constexpr int kAtOnce = P::kPartGroups;
    const int pair = lane_of_warp() % 4 * 2;
    int current[2];
    current_blocks(first_row, current);
#pragma unroll
    for (int first = 0; first < kGateGroups; first += kAtOnce) {
      if (begin + 8 * (first + kAtOnce) < end || begin + 8 * first >= end) continue;
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        const int block = begin + 8 * i + pair;
        if (block >= current[0]) scores[4 * i] = NAN;
        if (block + 1 >= current[0]) scores[4 * i + 1] = NAN;
        if (block >= current[1]) scores[4 * i + 2] = NAN;
        if (block + 1 >= current[1]) scores[4 * i + 3] = NAN;
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int first_row = threadIdx.x % kWarpgroup / 32 * 16;  // of the warp
    GateSelection<kHeadDim, kKept> selection(memory.warps[threadIdx.x / 32], static_cast<int>(p.shape.slots) - 1);
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = 0;
    if (lane_of_warp() == 0) memory.warps[threadIdx.x / 32].tile.phase = 0;
    __syncwarp();
    if (TURNS != 0 && consumer_of_thread() == P::kConsumers - 1) end_turn();
    for (;;) {
      int step = take_queries(first_row) - 1;
      if (step < -1) break;
      if (!AREG && step == -1 && lane_of_warp() == 0) mbarrier_arrive(shared_address(&memory.query_empty[consumer_of_thread()]));
      __syncwarp();
      int current[2];
      current_blocks(first_row, current);
      selection.begin(current[0] > 0, current[1] > 0);
      const int end = __reduce_max_sync(0xffffffffu, max(current[0], current[1]));
#pragma unroll 1
      for (; step >= 0; --step) {
        uint32_t means[P::kPanels];
        Ring<P::kSlots> place = ring;
#pragma unroll
        for (int panel = 0; panel < P::kPanels; ++panel) {
          means[panel] = shared_address(memory.slots[place.slot]);
          mbarrier_wait(shared_address(&memory.full[place.slot]), place.phase);
          place.advance();
        }
        if (TURNS != 0) begin_turn();
        multiply(means);
#pragma unroll
        for (int panel = 0; panel < P::kPanels; ++panel) release();
        if (!AREG && step == 0 && lane_of_warp() == 0) mbarrier_arrive(shared_address(&memory.query_empty[consumer_of_thread()]));
        const int begin = step * kGateMeans;
        if (begin < end) {
          if (begin + kGateMeans >= end) mask(first_row, begin, end);
          selection.take(scores, step, end);
        }
      }
      current_blocks(first_row, current);
      const GateTile& tile = memory.warps[threadIdx.x / 32].tile;
      int32_t* route = static_cast<int32_t*>(p.route.data) + tile.route;
      int32_t* routes[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane_of_warp() / 4 + 8 * half;
        routes[half] = row < tile.rows ? route + row * p.route.row : nullptr;
      }
      selection.finish(current, routes);
      __syncwarp();
    }
    // The turn that nobody takes.
    if (TURNS != 0 && consumer_of_thread() == 0) begin_turn();
  }
};

template <class T, int kHeadDim, int kKept>
__global__ void __launch_bounds__(GatePlan<kHeadDim, kKept>::kThreads, 1)
    gate_kernel(const __grid_constant__ GateParams p, const __grid_constant__ CUtensorMap map_q,
                const __grid_constant__ CUtensorMap map_means, const __grid_constant__ GateSchedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = GatePlan<kHeadDim, kKept>;
  extern __shared__ __align__(1024) unsigned char dynamic_memory[];
  auto& memory = *reinterpret_cast<typename P::Memory*>(dynamic_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kSlots; ++i) {
      mbarrier_init(shared_address(&memory.full[i]), 1);
      mbarrier_init(shared_address(&memory.empty[i]), 4 * P::kConsumers);
    }
    for (int i = 0; i < P::kConsumers; ++i) {
      mbarrier_init(shared_address(&memory.query_full[i]), 1);
      mbarrier_init(shared_address(&memory.query_empty[i]), 4);
    }
    fence_proxy_async();
  }
  __syncthreads();
  wait_for_earlier();
  let_next_start();
  if (threadIdx.x >= P::kConsumers * 128) {
    setmaxnreg_decrease<P::kProducerRegisters>();
    if (threadIdx.x != P::kConsumers * 128) return;
    GateProducer<T, kHeadDim, kKept> producer{p, schedule, &map_q, &map_means, memory};
    producer.run();
  } else {
    setmaxnreg_increase<P::kConsumerRegisters>();
    GateConsumer<T, kHeadDim, kKept> consumer{p, schedule, memory};
    consumer.run();
  }
#endif
}

template <class T, int kHeadDim, int kKept>
cudaError_t Gate<T, kHeadDim, kKept>::launch(const GateParams& p, const CUtensorMap& map_q,
                                             const CUtensorMap& map_means, unsigned max_grid, cudaStream_t stream) {
  using P = GatePlan<kHeadDim, kKept>;
  const Shape& shape = p.shape;
  const int64_t tiles = shape.cu_seqlens_q == nullptr ? (shape.rows + P::kTileRows - 1) / P::kTileRows
                                                      : shape.rows / P::kTileRows + shape.sequences;
  if (tiles * shape.units() > INT32_MAX - max_grid) return cudaErrorInvalidValue;
  const GateSchedule schedule{
      .unit_tiles = static_cast<int>(tiles),
      .tiles = static_cast<int>(tiles * shape.units()),
      .blocks = static_cast<int>(shape.blocks()),
      .units = Divisor(shape.units()),
      .heads = Divisor(shape.heads),
      .heads_per_key_head = Divisor(shape.heads_per_key_head()),
      .block_size = Divisor(shape.block_size),
  };
  constexpr int kBytes = sizeof(typename P::Memory);
  const auto kernel = gate_kernel<T, kHeadDim, kKept>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const unsigned grid = min(max_grid, static_cast<unsigned>(tiles * shape.units()));
  return launch_dependent(kernel, {grid, P::kThreads, kBytes}, stream, p, map_q, map_means, schedule);
}

}  // namespace moba::cuda::sm90
