// Products of a warpgroup: 64 rows times N columns, 16 deep, bf16 or f16 into float registers.
//
// Thread t of the warpgroup (warp w = t / 32, lane l = t % 32) holds of the result, for every 8 columns g,
//   d[4 g + 0, 1]: row 16 w + l / 4,     columns 8 g + 2 (l % 4) + 0, 1
//   d[4 g + 2, 3]: row 16 w + l / 4 + 8, the same columns
// Rounded to 16 bits and packed in pairs, 16 columns of a result are the A operand of the next product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moba::cuda::sm90 {

// Shared memory tiles have rows of 128 bytes (64 elements), swizzled: the 16-byte part c of row r lies at c ^ (r % 8).
// Wider tiles are several such panels.
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;

__device__ __forceinline__ uint32_t swizzled(int row, int part) {
  return row * kPanelRowBytes + ((part ^ (row % 8)) << 4);
}

// A 128-byte-swizzled operand. Strides in bytes: between groups of 8 rows it is always 1024; `panel_stride` lies
// between panels along N where N is the contiguous dimension (V), and is not used otherwise.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel_stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel_stride >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The same operand `bytes` further on, a multiple of 16.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to registers of a product across the wait for it.
template <int kCount>
__device__ __forceinline__ void settle(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void settle(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define MOBA_REGISTERS_32                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOBA_REGISTERS_64                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOBA_INOUT_8(d, i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MOBA_OUT_8(d, i)                                                                                      \
  "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), "=f"(d[i + 6]), \
      "=f"(d[i + 7])
#define MOBA_OUT_32(d, i) MOBA_OUT_8(d, i), MOBA_OUT_8(d, i + 8), MOBA_OUT_8(d, i + 16), MOBA_OUT_8(d, i + 24)
#define MOBA_OUT_64(d, i) MOBA_OUT_32(d, i), MOBA_OUT_32(d, i + 32)
#define MOBA_INOUT_32(d, i) MOBA_INOUT_8(d, i), MOBA_INOUT_8(d, i + 8), MOBA_INOUT_8(d, i + 16), MOBA_INOUT_8(d, i + 24)
#define MOBA_INOUT_64(d, i) MOBA_INOUT_32(d, i), MOBA_INOUT_32(d, i + 32)

// COUNT registers hold N = 2 COUNT columns; the operands after them are numbered from COUNT on.
#define MOBA_WGMMA_SHARED(N, COUNT, TYPE, D, A, B, P)                                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" MOBA_REGISTERS_##COUNT "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                         \
               : D##_##COUNT(d, 0)                                                                               \
               : "l"(a), "l"(b), "r"(accumulate))
#define MOBA_WGMMA_REGISTERS(N, COUNT, TYPE, D, A0, A1, A2, A3, B, P)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" MOBA_REGISTERS_##COUNT "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 1;\n}" \
               : D##_##COUNT(d, 0)                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// d (+)= A B: A [64, 16] and B [N, 16] in shared memory, both contiguous along the 16. The first product of a sum (..
// _first, accumulate = 0) says that the registers held nothing, which an operand that is read and written would keep.
#define MOBA_DEFINE_WGMMA_SHARED(NAME, D)                                                       \
  template <class T>                                                                            \
  __device__ __forceinline__ void NAME(float(&d)[64], uint64_t a, uint64_t b, int accumulate) { \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                           \
      MOBA_WGMMA_SHARED("128", 64, "bf16", D, "%64", "%65", "%66");                             \
    } else {                                                                                    \
      MOBA_WGMMA_SHARED("128", 64, "f16", D, "%64", "%65", "%66");                              \
    }                                                                                           \
  }                                                                                             \
  template <class T>                                                                            \
  __device__ __forceinline__ void NAME(float(&d)[32], uint64_t a, uint64_t b, int accumulate) { \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                           \
      MOBA_WGMMA_SHARED("64", 32, "bf16", D, "%32", "%33", "%34");                              \
    } else {                                                                                    \
      MOBA_WGMMA_SHARED("64", 32, "f16", D, "%32", "%33", "%34");                               \
    }                                                                                           \
  }
MOBA_DEFINE_WGMMA_SHARED(wgmma_shared, MOBA_INOUT)
MOBA_DEFINE_WGMMA_SHARED(wgmma_shared_first, MOBA_OUT)
#undef MOBA_DEFINE_WGMMA_SHARED

// d (+)= A B: A [64, 16] in registers, B [16, N] in shared memory, contiguous along N.
#define MOBA_DEFINE_WGMMA_REGISTERS(NAME, D)                                                           \
  template <class T>                                                                                   \
  __device__ __forceinline__ void NAME(float(&d)[64], const uint32_t* a, uint64_t b, int accumulate) { \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                                  \
      MOBA_WGMMA_REGISTERS("128", 64, "bf16", D, "%64", "%65", "%66", "%67", "%68", "%69");            \
    } else {                                                                                           \
      MOBA_WGMMA_REGISTERS("128", 64, "f16", D, "%64", "%65", "%66", "%67", "%68", "%69");             \
    }                                                                                                  \
  }                                                                                                    \
  template <class T>                                                                                   \
  __device__ __forceinline__ void NAME(float(&d)[32], const uint32_t* a, uint64_t b, int accumulate) { \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                                  \
      MOBA_WGMMA_REGISTERS("64", 32, "bf16", D, "%32", "%33", "%34", "%35", "%36", "%37");             \
    } else {                                                                                           \
      MOBA_WGMMA_REGISTERS("64", 32, "f16", D, "%32", "%33", "%34", "%35", "%36", "%37");              \
    }                                                                                                  \
  }
MOBA_DEFINE_WGMMA_REGISTERS(wgmma_registers, MOBA_INOUT)
MOBA_DEFINE_WGMMA_REGISTERS(wgmma_registers_first, MOBA_OUT)
#undef MOBA_DEFINE_WGMMA_REGISTERS

#define MOBA_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MOBA_INOUT_16(d, i) MOBA_INOUT_8(d, i), MOBA_INOUT_8(d, i + 8)
#define MOBA_WGMMA_CROSSED(N, COUNT, TYPE, A, B, P)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" MOBA_REGISTERS_##COUNT "}, " A ", " B ", p, 1, 1, 0, 1;\n}"                         \
               : MOBA_INOUT_##COUNT(d, 0)                                                                        \
               : "l"(a), "l"(b), "r"(accumulate))
#define MOBA_WGMMA_TRANSPOSED(N, COUNT, TYPE, A, B, P)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" MOBA_REGISTERS_##COUNT "}, " A ", " B ", p, 1, 1, 1, 1;\n}"                         \
               : MOBA_INOUT_##COUNT(d, 0)                                                                        \
               : "l"(a), "l"(b), "r"(accumulate))

// d (+)= A B: A [64, 16] and B [16, N] in shared memory, A contiguous along the 16 and B along N.
template <class T>
__device__ __forceinline__ void wgmma_crossed(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_CROSSED("128", 64, "bf16", "%64", "%65", "%66");
  } else {
    MOBA_WGMMA_CROSSED("128", 64, "f16", "%64", "%65", "%66");
  }
}
template <class T>
__device__ __forceinline__ void wgmma_crossed(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_CROSSED("64", 32, "bf16", "%32", "%33", "%34");
  } else {
    MOBA_WGMMA_CROSSED("64", 32, "f16", "%32", "%33", "%34");
  }
}

// d (+)= A B: A [64, 16] and B [16, N] in shared memory, A contiguous along the 64 and B along N.
template <class T>
__device__ __forceinline__ void wgmma_transposed(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_TRANSPOSED("64", 32, "bf16", "%32", "%33", "%34");
  } else {
    MOBA_WGMMA_TRANSPOSED("64", 32, "f16", "%32", "%33", "%34");
  }
}
template <class T>
__device__ __forceinline__ void wgmma_transposed(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_TRANSPOSED("32", 16, "bf16", "%16", "%17", "%18");
  } else {
    MOBA_WGMMA_TRANSPOSED("32", 16, "f16", "%16", "%17", "%18");
  }
}

// The operand `bytes` further in shared memory.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000) | low;
}

#define MOBA_WGMMA_REGISTERS_ROWS(N, COUNT, TYPE, D, A0, A1, A2, A3, B, P)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " {" MOBA_REGISTERS_##COUNT "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 0;\n}" \
               : D##_##COUNT(d, 0)                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// d (+)= A B: A [64, 16] in registers, B [N, 16] in shared memory, contiguous along the 16.
template <class T>
__device__ __forceinline__ void wgmma_registers_rows(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                     int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_REGISTERS_ROWS("128", 64, "bf16", MOBA_INOUT, "%64", "%65", "%66", "%67", "%68", "%69");
  } else {
    MOBA_WGMMA_REGISTERS_ROWS("128", 64, "f16", MOBA_INOUT, "%64", "%65", "%66", "%67", "%68", "%69");
  }
}

#undef MOBA_WGMMA_REGISTERS_ROWS
#undef MOBA_REGISTERS_16
#undef MOBA_INOUT_16
#undef MOBA_WGMMA_CROSSED
#undef MOBA_WGMMA_TRANSPOSED
#undef MOBA_REGISTERS_32
#undef MOBA_REGISTERS_64
#undef MOBA_INOUT_8
#undef MOBA_INOUT_32
#undef MOBA_INOUT_64
#undef MOBA_WGMMA_SHARED
#undef MOBA_WGMMA_REGISTERS

// Two results as one register of an A operand.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace moba::cuda::sm90
