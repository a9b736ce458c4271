// The PTX instructions that the kernels use, each as one function.
//
// tests/cuda_host/common/ptx.cuh is this header's twin on the host. Lane layouts are those of the PTX
// ISA's "Matrix Fragments for mma.m16n8k16": with g = lane / 4 and t = lane % 4 a lane holds
//     a[0] = A[g][2t, 2t+1]        a[1] = A[g+8][2t, 2t+1]
//     a[2] = A[g][2t+8, 2t+9]      a[3] = A[g+8][2t+8, 2t+9]
//     b[0] = B[2t, 2t+1][g]        b[1] = B[2t+8, 2t+9][g]
//     c[0], c[1] = C[g][2t, 2t+1]  c[2], c[3] = C[g+8][2t, 2t+1]
// the lower half of a register being the first of two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace llama_fast::cuda {

// c += A · B for A (16, 16), B (16, 8), C (16, 8) float.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                           const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of
// matrix i / 8, 16 bytes, and gets in r[m] the elements (g, 2t) and (g, 2t + 1) of matrix m.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices: r[m] holds the elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Starts the copy of 16 bytes from global to shared memory, or of zeros where `valid` is false; the
// global address is not read then. Both are aligned to 16 bytes.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same of 4 bytes, aligned to as many.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// The copies that this thread has started since the last group become one.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most OPEN of this thread's groups, the latest, are still under way.
template <int OPEN> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

// Sixteen or four bytes of what is read once: they do not push anything out of the first cache.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(p));
  return bits;
}
__device__ __forceinline__ uint32_t load_once(const uint32_t* p) {
  uint32_t bits;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(bits) : "l"(p));
  return bits;
}

// The sums of two pairs of half types, each rounded.
template <class T> __device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b);
template <> __device__ __forceinline__ uint32_t add_pairs<__half>(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
template <>
__device__ __forceinline__ uint32_t add_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t sum;  // sm_80 has no addition of bfloat16, but a · 1 + b
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
}

// 2^x, within 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to a pair, `first` in the lower half.
template <class T> __device__ __forceinline__ uint32_t pack(float first, float second);
template <> __device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Bytes picked from the eight of (low, high), by the nibbles of `pick`.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t pick) {
  return __byte_perm(low, high, pick);
}

// The same of bytes below 128, but 0 where the highest bit of a digit of `pick` is set (the sign of a byte).
__device__ __forceinline__ uint32_t pick_bytes_or_zero(uint32_t low, uint32_t high, uint32_t pick) {
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(pick));
  return picked;
}

}  // namespace llama_fast::cuda
