// dq: from the sums in memory, or as the sum of the partials of each row in the order of its slots. head_dim / 8 lanes
// hold a row, in the permuted order of the products; four of them exchange what they hold of 32 columns at the end.
// Runs beside the splits, whose thread blocks let it start when all earlier kernels are complete.
#include "cuda/portable/unit.cuh"
#include "cuda/sm90/backward/store.cuh"
#include "cuda/sm90/dependent.cuh"

namespace moba::cuda::sm90::backward {
namespace {

constexpr int kThreadsPerBlock = 256;
constexpr int kColumns = 8;  // of a lane: columns 8 g + 2 j + e of each 32, for lane j of four
constexpr int kAtOnce = 8;   // loads under way

template <class T, int kHeadDim>
struct Row {
  static constexpr int kLanes = kHeadDim / kColumns;
  const BackwardParams& p;
  const Workspace& work;
  const Pass& pass;
  int local;    // unit of the lists
  int64_t row;  // of the unit
  int lane;
  unsigned lanes;

  __device__ __forceinline__ int64_t index() const { return local * p.shape.rows + row; }
  __device__ __forceinline__ float4* sums() const {
    return reinterpret_cast<float4*>(work.sums + index() * kHeadDim) + lane / 4 * 8 + lane % 4;
  }
  __device__ __forceinline__ void load(float (&values)[kColumns], float scale) const {
    const float4 a = sums()[0], b = sums()[4];
    values[0] = a.x * scale, values[1] = a.y * scale, values[2] = a.z * scale, values[3] = a.w * scale;
    values[4] = b.x * scale, values[5] = b.y * scale, values[6] = b.z * scale, values[7] = b.w * scale;
  }
  __device__ __forceinline__ void keep(const float (&values)[kColumns]) const {
    sums()[0] = make_float4(values[0], values[1], values[2], values[3]);
    sums()[4] = make_float4(values[4], values[5], values[6], values[7]);
  }

  // Key tiles of the pass in the row's own block with a key that it sees.
  __device__ __forceinline__ int own_tiles() const {
    const int32_t position = static_cast<int32_t>(sequence_of_row(p.shape, row).position(row));
    if (position < 0) return 0;
    const int32_t block_size = static_cast<int32_t>(min(p.shape.block_size, p.shape.keys));
    return min(position % block_size / kKeyTile + 1 - pass.tile_begin, pass.tiles);
  }

  __device__ __forceinline__ void add_partials(float (&values)[kColumns]) const {
    const int64_t unit_k = local / work.heads;
    const int64_t own_row = work.entries + index() - unit_k * work.rows;
    const T* partials = static_cast<const T*>(work.partials) + unit_k * work.partial_rows * work.pass_tiles * kHeadDim +
                        lane * kColumns;
    const int32_t* positions = p.lists.positions + index() * p.shape.slots;
    const int slots = static_cast<int>(p.shape.slots), tiles = pass.tiles, own = own_tiles();
    for (int slot0 = 0; slot0 < slots; slot0 += kLanes) {
      // Each lane looks up one slot of kLanes.
      const int32_t looked_up = slot0 + lane < slots ? positions[slot0 + lane] : kUnused;
      const int count = min(kLanes, slots - slot0) * tiles;
      int slot = 0, tile = 0;
      for (int first = 0; first < count; first += kAtOnce) {
        uint4 words[kAtOnce];
        bool written[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t position = __shfl_sync(lanes, looked_up, slot, kLanes);
          written[i] = first + i < count && (position >= 0 || (position == kCurrent && tile < own));
          if (written[i]) {
            const int64_t part = (position >= 0 ? position : own_row) * work.pass_tiles + tile;
            words[i] = __ldcs(reinterpret_cast<const uint4*>(partials + part * kHeadDim));
          }
          if (++tile == tiles) {
            tile = 0;
            ++slot;
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (!written[i]) continue;
          const T* parts = reinterpret_cast<const T*>(&words[i]);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) values[j] += to_acc(parts[j]);
        }
      }
    }
  }
};

template <class T, int kHeadDim, bool kReduce>
__global__ void __launch_bounds__(kThreadsPerBlock)
    queries_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Workspace work,
                   const __grid_constant__ Pass pass, int unit_blocks) {
  constexpr int kLanes = kHeadDim / kColumns;
  let_next_start();
  if (blockIdx.x + 1 == gridDim.x) wait_for_earlier();  // so that this kernel ends after the splits
  const Shape& shape = p.shape;
  const int local = static_cast<int>(blockIdx.x) / unit_blocks;
  const int block = static_cast<int>(blockIdx.x) - local * unit_blocks;
  const int64_t row = static_cast<int64_t>(block) * (kThreadsPerBlock / kLanes) + threadIdx.x / kLanes;
  const bool exists = row < shape.rows;  // a warp has several rows
  const int lane = threadIdx.x % kLanes;
  const unsigned lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  const Row<T, kHeadDim> here{p, work, pass, local, row, lane, lanes};
  float values[kColumns] = {};
  if (exists) {
    if constexpr (kReduce) {
      here.load(values, static_cast<float>(p.softmax_scale));
    } else {
      if (!pass.first) here.load(values, 1.f);
      here.add_partials(values);
      if (!pass.last) here.keep(values);
    }
  }
  if (!kReduce && !pass.last) return;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  transpose(words);
  if (!exists) return;
  if (!all_finite(values)) work.counters->broken = 1;
  T* dq =
      unit_rows<T>(p.dq, p.lists.units_k.begin * work.heads + local, shape.heads) + row * p.dq.row + lane * kColumns;
  *reinterpret_cast<uint4*>(dq) = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T, int kHeadDim>
cudaError_t launch(const BackwardParams& p, const Workspace& work, const Pass& pass, bool reduce, cudaStream_t stream) {
  constexpr int kBlockRows = kThreadsPerBlock * kColumns / kHeadDim;
  const int64_t unit_blocks = (p.shape.rows + kBlockRows - 1) / kBlockRows;
  const int64_t grid = p.lists.units_k.count * p.shape.heads_per_key_head() * unit_blocks;
  if (!fits_grid(grid)) return cudaErrorInvalidValue;
  const auto kernel = reduce ? queries_kernel<T, kHeadDim, true> : queries_kernel<T, kHeadDim, false>;
  return launch_dependent(kernel, {static_cast<unsigned>(grid), kThreadsPerBlock, 0}, stream, p, work, pass,
                          static_cast<int>(unit_blocks));
}

}  // namespace

cudaError_t launch_queries(const BackwardParams& p, const Workspace& work, const Pass& pass, bool reduce, Dtype dtype,
                           cudaStream_t stream) {
  const bool wide = p.shape.head_dim == 128;
  if (dtype == Dtype::kHalf) {
    return wide ? launch<__half, 128>(p, work, pass, reduce, stream)
                : launch<__half, 64>(p, work, pass, reduce, stream);
  }
  return wide ? launch<__nv_bfloat16, 128>(p, work, pass, reduce, stream)
              : launch<__nv_bfloat16, 64>(p, work, pass, reduce, stream);
}

}  // namespace moba::cuda::sm90::backward
