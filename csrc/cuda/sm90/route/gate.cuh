// Gate scores on the tensor cores and the best blocks of every query: one producer thread loads queries and block means
// by TMA; each consumer warpgroup multiplies 64 queries, in registers, with 128 means at a time, from the latest block
// down, and keeps the best of them (select.cuh).
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

  Ring<P::kSlots> mean;
  uint32_t query_phase = 0;

  __device__ __forceinline__ void load_queries(int consumer, GateTile tile, int row, int head, int group) {
    const uint32_t full = shared_address(&memory.query_full[consumer]);
    mbarrier_wait(shared_address(&memory.query_empty[consumer]), query_phase ^ 1);
    tile.phase = query_phase ^ 1;
    memory.tiles[consumer] = tile;
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

  __device__ __forceinline__ void load_means(int row) {
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      const uint32_t full = shared_address(&memory.mean_full[mean.slot]);
      mbarrier_wait(shared_address(&memory.mean_empty[mean.slot]), mean.phase ^ 1);
      mbarrier_arrive_expect_tx(full, P::kSlotBytes);
      tma_load_4d(shared_address(memory.slots[mean.slot]), map_means, full, panel * kPanelColumns, row, 0, 0);
      mean.advance();
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
        const GateTile tile{route + skipped * p.route.row, rows - skipped, position + skipped, steps, 0};
        load_queries(consumer, tile, row + skipped, head, group);
      }
      query_phase ^= 1;
      const int first = schedule.heads_per_key_head.divide(unit) * schedule.blocks + first_block;
      for (int step = steps - 1; step >= 0; --step) load_means(first + step * kGateMeans);
    }
    for (int consumer = 0; consumer < P::kConsumers; ++consumer) load_queries(consumer, {0, 0, 0, -1, 0}, 0, 0, 0);
  }
};

// Read anew where it is needed, for want of registers.
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
  Ring<P::kSlots> mean;

  __device__ __forceinline__ typename P::Warp& warp() { return memory.warps[threadIdx.x / 32]; }

  // For all lanes of the warp.
  __device__ __forceinline__ void arrive(uint64_t* barrier) {
    __syncwarp();
    if (lane_of_warp() == 0) mbarrier_arrive(shared_address(barrier));
  }

  // Takes the next tile's queries to registers; returns its steps.
  __device__ __forceinline__ int take_queries(int first_row) {
    const int consumer = consumer_of_thread(), lane = lane_of_warp();
    mbarrier_wait(shared_address(&memory.query_full[consumer]), warp().tile.phase);
    __syncwarp();
    if (lane == 0) warp().tile = memory.tiles[consumer];
    const uint32_t from = shared_address(memory.queries[consumer]);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      load_matrices(queries[k], from + k / 4 * (kGateQueries * kPanelRowBytes) +
                                    swizzled(first_row + lane % 16, k % 4 * 2 + lane / 16));
    }
    arrive(&memory.query_empty[consumer]);
    return warp().tile.steps;
  }

  // The blocks before the current ones of this lane's rows; 0 for rows that do not exist.
  __device__ __forceinline__ void current_blocks(int first_row, int (&current)[2]) {
    const GateTile& tile = warp().tile;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane_of_warp() / 4 + 8 * half, position = tile.position + row;
      current[half] = row >= tile.rows ? 0 : position < 0 ? -1 : schedule.block_size.divide(position);
    }
  }

  // Where consumers multiply in turns, one multiplies while the other selects.
  __device__ __forceinline__ void begin_turn() { named_barrier_sync(1 + consumer_of_thread(), 2 * kWarpgroup); }
  __device__ __forceinline__ void end_turn() {
    const int next = consumer_of_thread() + 1;
    named_barrier_arrive(next < P::kConsumers ? 1 + next : 1, 2 * kWarpgroup);
  }

  __device__ __forceinline__ void multiply() {
    uint32_t means[P::kPanels];
    Ring<P::kSlots> place = mean;
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      means[panel] = shared_address(memory.slots[place.slot]);
      mbarrier_wait(shared_address(&memory.mean_full[place.slot]), place.phase);
      place.advance();
    }
    if (P::kTurns) begin_turn();
    wgmma_fence();
    constexpr int kProducts = kHeadDim / 16;
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      wgmma_registers_rows<T>(scores, queries[k], descriptor(means[k / 4] + k % 4 * 32, 16), k > 0);
      // The next consumer's products follow the last quarter of these without a gap.
      if (P::kTurns && k == kProducts - kProducts / 4 - 1) wgmma_commit();
    }
    wgmma_commit();
    if (P::kTurns) {
      wgmma_wait<1>();
      end_turn();
    }
    wgmma_wait<0>();
    settle(scores);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      arrive(&memory.mean_empty[mean.slot]);
      mean.advance();
    }
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
    GateSelection<kHeadDim, kKept> selection(warp(), static_cast<int>(p.shape.slots) - 1);
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = 0;
    if (lane_of_warp() == 0) warp().tile.phase = 0;
    __syncwarp();
    if (P::kTurns && consumer_of_thread() == P::kConsumers - 1) end_turn();
    for (;;) {
      int step = take_queries(first_row) - 1;
      if (step < -1) break;
      int current[2];
      current_blocks(first_row, current);
      selection.begin(current[0] > 0, current[1] > 0);
      const int end = __reduce_max_sync(0xffffffffu, max(current[0], current[1]));
#pragma unroll 1
      for (; step >= 0; --step) {
        multiply();
        const int begin = step * kGateMeans;
        if (begin >= end) continue;
        if (begin + kGateMeans >= end) mask(first_row, begin, end);
        selection.take(scores, step, end);
      }
      current_blocks(first_row, current);
      const GateTile& tile = warp().tile;
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
    if (P::kTurns && consumer_of_thread() == 0) begin_turn();
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
      mbarrier_init(shared_address(&memory.mean_full[i]), 1);
      mbarrier_init(shared_address(&memory.mean_empty[i]), 4 * P::kConsumers);
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
