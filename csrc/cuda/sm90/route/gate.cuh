// Gate scores on the tensor cores and the best blocks of every query: one producer warp loads queries and block means
// by TMA; each consumer warpgroup multiplies 64 queries with 128 means at a time, from the latest block down, and keeps
// the best of them (select.cuh). While one consumer selects, the other multiplies.
#pragma once

#include "cuda/portable/unit.cuh"
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

  Ring<P::kQueryStages> query;
  Ring<P::kStages> mean;

  __device__ __forceinline__ void load_queries(int consumer, const GateTile& tile, int row, int head, int group) {
    const uint32_t full = shared_address(&memory.query_full[query.slot][consumer]);
    mbarrier_wait(shared_address(&memory.query_empty[query.slot][consumer]), query.phase ^ 1);
    memory.tiles[query.slot][consumer] = tile;
    if (tile.rows <= 0 || tile.steps <= 0) {
      mbarrier_arrive(full);
      return;
    }
    mbarrier_arrive_expect_tx(full, P::kQueryBytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(memory.queries[query.slot][consumer]) + panel * (kGateQueries * kPanelRowBytes), map_q,
                  full, panel * kPanelColumns, row, head, group);
    }
  }

  __device__ __forceinline__ void load_means(int row) {
    const uint32_t full = shared_address(&memory.mean_full[mean.slot]);
    mbarrier_wait(shared_address(&memory.mean_empty[mean.slot]), mean.phase ^ 1);
    mbarrier_arrive_expect_tx(full, P::kMeanBytes);
#pragma unroll
    for (int panel = 0; panel < P::kPanels; ++panel) {
      tma_load_4d(shared_address(memory.means[mean.slot]) + panel * (kGateMeans * kPanelRowBytes), map_means, full,
                  panel * kPanelColumns, row, 0, 0);
    }
    mean.advance();
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
        load_queries(consumer, tile, row + skipped, head, group);
      }
      query.advance();
      const int first = schedule.heads_per_key_head.divide(unit) * schedule.blocks + first_block;
      for (int step = steps - 1; step >= 0; --step) load_means(first + step * kGateMeans);
    }
    for (int consumer = 0; consumer < P::kConsumers; ++consumer) load_queries(consumer, {0, 0, 0, -1}, 0, 0, 0);
  }
};

template <class T, int kHeadDim, int kKept>
struct GateConsumer {
  using P = GatePlan<kHeadDim, kKept>;

  const GateParams& p;
  const GateSchedule& schedule;
  typename P::Memory& memory;

  float scores[64];
  Ring<P::kQueryStages> query;
  Ring<P::kStages> mean;

  __device__ __forceinline__ void arrive(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(barrier));
  }

  __device__ __forceinline__ void multiply(uint32_t queries, uint32_t means) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      wgmma_shared<T>(scores, descriptor(queries + i / 4 * (kGateQueries * kPanelRowBytes) + i % 4 * 32, 16),
                      descriptor(means + i / 4 * (kGateMeans * kPanelRowBytes) + i % 4 * 32, 16), i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(scores);
  }

  // Blocks from `current` on are no candidates, all before `fewest` are, and nobody looks at parts from `most` on;
  // counted from the first column of the step.
  __device__ __forceinline__ void mask(int current0, int current1, int fewest, int most) {
    constexpr int kAtOnce = P::kPartGroups;
#pragma unroll
    for (int first = 0; first < kGateGroups; first += kAtOnce) {
      if (8 * (first + kAtOnce) <= fewest || 8 * first >= most) continue;
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        const int column = 8 * i + threadIdx.x % 4 * 2;
        if (column >= current0) scores[4 * i] = NAN;
        if (column + 1 >= current0) scores[4 * i + 1] = NAN;
        if (column >= current1) scores[4 * i + 2] = NAN;
        if (column + 1 >= current1) scores[4 * i + 3] = NAN;
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int consumer = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int first_row = threadIdx.x % 128 / 32 * 16;  // of the warp
    GateSelection<kHeadDim, kKept> selection(memory.warps[threadIdx.x / 32], static_cast<int>(p.shape.slots) - 1);
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = 0;
    for (;; query.advance()) {
      mbarrier_wait(shared_address(&memory.query_full[query.slot][consumer]), query.phase);
      const GateTile tile = memory.tiles[query.slot][consumer];
      if (tile.steps < 0) return;
      const auto current_of = [&](int row) {
        const int position = tile.position + row;
        return position < 0 ? -1 : schedule.block_size.divide(position);
      };
      const int row0 = first_row + lane / 4, row1 = row0 + 8;
      const int current0 = row0 < tile.rows ? current_of(row0) : 0, current1 = row1 < tile.rows ? current_of(row1) : 0;
      // Of the whole tile, and of this warp.
      const int tile_blocks = tile.rows > 0 ? current_of(min(tile.rows, kGateQueries) - 1) : 0;
      const int warp_blocks = __reduce_max_sync(0xffffffffu, max(current0, current1));
      const int fewest = current_of(first_row);
      selection.begin(current0 > 0, current1 > 0);
      for (int step = tile.steps - 1; step >= 0; --step) {
        const int begin = step * kGateMeans;
        mbarrier_wait(shared_address(&memory.mean_full[mean.slot]), mean.phase);
        if (begin < tile_blocks) {
          multiply(shared_address(memory.queries[query.slot][consumer]), shared_address(memory.means[mean.slot]));
        }
        arrive(&memory.mean_empty[mean.slot]);
        if (step == 0) arrive(&memory.query_empty[query.slot][consumer]);
        mean.advance();
        if (begin < warp_blocks) {
          if (begin + kGateMeans > fewest)
            mask(current0 - begin, current1 - begin, fewest - begin, warp_blocks - begin);
          selection.take(scores, step, warp_blocks - begin);
        }
      }
      if (tile.steps == 0) arrive(&memory.query_empty[query.slot][consumer]);
      int32_t* route = static_cast<int32_t*>(p.route.data) + tile.route;
      int32_t* const routes[2] = {row0 < tile.rows ? route + row0 * p.route.row : nullptr,
                                  row1 < tile.rows ? route + row1 * p.route.row : nullptr};
      selection.write({current0, current1}, routes);
    }
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
    for (int i = 0; i < P::kQueryStages * P::kConsumers; ++i) {
      mbarrier_init(shared_address(&memory.query_full[0][i]), 1);
      mbarrier_init(shared_address(&memory.query_empty[0][i]), 4);
    }
    for (int i = 0; i < P::kStages; ++i) {
      mbarrier_init(shared_address(&memory.mean_full[i]), 1);
      mbarrier_init(shared_address(&memory.mean_empty[i]), 4 * P::kConsumers);
    }
    fence_proxy_async();
  }
  __syncthreads();
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
  kernel<<<grid, P::kThreads, kBytes, stream>>>(p, map_q, map_means, schedule);
  return cudaGetLastError();
}

}  // namespace moba::cuda::sm90
