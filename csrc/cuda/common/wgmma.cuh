// Products of matrices by a warpgroup; for sm_90a. PTX ISA, "wgmma.mma_async".
//
// D (64, N) += A (64, 16) · B (16, N), in float. Of A and D each warp of the warpgroup has 16 rows, in
// the lane layout of ptx.cuh: d[n] are the four numbers of the columns 8n … 8n + 7.
//
// Products run on while the threads do. Between warpgroup_arrive() and the wait for them, neither the
// registers of D and A nor the shared memory of A and B may be touched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "shared_address.cuh"

namespace llama_fast::cuda {

// Where a matrix begins in shared memory, in rows of 128 bytes whose chunks are swizzled as tma.cuh
// says, eight rows after another being `stride` bytes apart.
//     K-major: a row has 64 elements of k; the rows are those of A, or the columns of B
//     N-major: a row has 64 columns of one k; `leading` is the distance of the next 64 columns
// PTX ISA, "Matrix Descriptor Format".
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, int leading,
                                                      int stride = 1024) {
  constexpr uint64_t SWIZZLE_128_BYTES = 1;
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | SWIZZLE_128_BYTES << 62;
}

// Before the first product, and whenever threads have written registers of D or A since.
__device__ __forceinline__ void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last group become one.
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most OPEN groups, the latest, are still under way; `d` is of those that are not. It
// is named so that the compiler moves no use of it ahead of the wait.
template <int OPEN, int COLUMNS>
__device__ __forceinline__ void warpgroup_wait(float (&d)[COLUMNS][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory");
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

#define LLAMA_FAST_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define LLAMA_FAST_D4(n) \
  LLAMA_FAST_D1(n), LLAMA_FAST_D1(n + 1), LLAMA_FAST_D1(n + 2), LLAMA_FAST_D1(n + 3)
#define LLAMA_FAST_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LLAMA_FAST_REGISTERS_64 \
  LLAMA_FAST_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// A and B K-major in shared memory, N 128. D is overwritten where not `accumulate`.
template <class T>
__device__ __forceinline__ void multiply_shared(float (&d)[16][4], uint64_t a, uint64_t b,
                                                bool accumulate);
// A in registers, B N-major in shared memory.
template <class T>
__device__ __forceinline__ void multiply_registers(float (&d)[16][4], const uint32_t (&a)[4],
                                                   uint64_t b);
template <class T>
__device__ __forceinline__ void multiply_registers(float (&d)[8][4], const uint32_t (&a)[4],
                                                   uint64_t b);

#define LLAMA_FAST_WGMMA(TYPE, NAME)                                                             \
  template <>                                                                                    \
  __device__ __forceinline__ void multiply_shared<TYPE>(float (&d)[16][4], uint64_t a,           \
                                                        uint64_t b, bool accumulate) {           \
    asm volatile(                                                                                \
        "{\n"                                                                                    \
        ".reg .pred accumulate;\n"                                                               \
        "setp.ne.b32 accumulate, %66, 0;\n"                                                      \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME                             \
        " {" LLAMA_FAST_REGISTERS_64 "}, %64, %65, accumulate, 1, 1, 0, 0;\n"                    \
        "}"                                                                                      \
        : LLAMA_FAST_D4(0), LLAMA_FAST_D4(4), LLAMA_FAST_D4(8), LLAMA_FAST_D4(12)                \
        : "l"(a), "l"(b), "r"(int(accumulate)));                                                 \
  }                                                                                              \
  template <>                                                                                    \
  __device__ __forceinline__ void multiply_registers<TYPE>(                                      \
      float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {                                   \
    asm volatile(                                                                                \
        "{\n"                                                                                    \
        ".reg .pred accumulate;\n"                                                               \
        "setp.eq.b32 accumulate, 0, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME                             \
        " {" LLAMA_FAST_REGISTERS_64 "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 1;\n"      \
        "}"                                                                                      \
        : LLAMA_FAST_D4(0), LLAMA_FAST_D4(4), LLAMA_FAST_D4(8), LLAMA_FAST_D4(12)                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
  }                                                                                              \
  template <>                                                                                    \
  __device__ __forceinline__ void multiply_registers<TYPE>(                                      \
      float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {                                    \
    asm volatile(                                                                                \
        "{\n"                                                                                    \
        ".reg .pred accumulate;\n"                                                               \
        "setp.eq.b32 accumulate, 0, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                              \
        " {" LLAMA_FAST_REGISTERS_32 "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;\n"      \
        "}"                                                                                      \
        : LLAMA_FAST_D4(0), LLAMA_FAST_D4(4)                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
  }
LLAMA_FAST_WGMMA(__nv_bfloat16, "bf16")
LLAMA_FAST_WGMMA(__half, "f16")
#undef LLAMA_FAST_WGMMA
#undef LLAMA_FAST_REGISTERS_64
#undef LLAMA_FAST_REGISTERS_32
#undef LLAMA_FAST_D4
#undef LLAMA_FAST_D1

}  // namespace llama_fast::cuda
