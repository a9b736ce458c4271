// The twin of csrc/cuda/common/ptx.cuh on the host: each instruction as the PTX ISA words it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../../csrc/cuda/kernels.h"

namespace llama_fast::cuda {

namespace host {

// What a lane brings to an instruction of the whole warp.
struct Mma {
  float* c;
  const uint32_t *a, *b;
};

inline float widen(uint16_t bits, __nv_bfloat16*) { return __bfloat162float({bits}); }
inline float widen(uint16_t bits, __half*) { return __half2float({bits}); }

template <class T> float element(uint32_t pair, int i) {
  return widen(uint16_t(pair >> 16 * i), static_cast<T*>(nullptr));
}

template <class T> __attribute__((no_sanitize("thread"))) void mma(void* const* all) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Mma*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      A[g][2 * t + i] = element<T>(own.a[0], i);
      A[g + 8][2 * t + i] = element<T>(own.a[1], i);
      A[g][2 * t + 8 + i] = element<T>(own.a[2], i);
      A[g + 8][2 * t + 8 + i] = element<T>(own.a[3], i);
      B[2 * t + i][g] = element<T>(own.b[0], i);
      B[2 * t + 8 + i][g] = element<T>(own.b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<const Mma*>(all[lane])->c;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int m = g + i / 2 * 8, n = 2 * t + i % 2;
      float sum = c[i];
      for (int k = 0; k < 16; ++k) sum += A[m][k] * B[k][n];
      c[i] = sum;
    }
  }
}

struct Matrices {
  const void* row;
  uint32_t* r;
  int thread;
};

template <bool TRANSPOSED>
__attribute__((no_sanitize("thread"))) inline void load_matrices(void* const* all) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Matrices*>(all[lane]);
    cuda_host::reads(own.row, 16, own.thread);
    std::memcpy(matrix[lane / 8][lane % 8], own.row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const auto& of = matrix[m];
      const uint32_t first = TRANSPOSED ? of[2 * t][g] : of[g][2 * t];
      const uint32_t second = TRANSPOSED ? of[2 * t + 1][g] : of[g][2 * t + 1];
      static_cast<const Matrices*>(all[lane])->r[m] = first | second << 16;
    }
  }
}

inline void require(bool holds, const char* what) {
  if (!holds) throw LaunchError(what);
}

inline bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace host

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 CUDA_HOST_CALLED_FROM) {
  host::Mma own{c, a, b};
  cuda_host::warp_operation(CUDA_HOST_HERE("mma"), 0xffffffffu, &own, host::mma<T>, false);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, CUDA_HOST_CALLED_FROM) {
  host::require(host::aligned_to_16(row), "ldmatrix: a row is not aligned to 16 bytes");
  host::Matrices own{row, r, cuda_host::self->number};
  cuda_host::warp_operation(CUDA_HOST_HERE("ldmatrix"), 0xffffffffu, &own,
                            host::load_matrices<false>, false);
}

inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, CUDA_HOST_CALLED_FROM) {
  host::require(host::aligned_to_16(row), "ldmatrix: a row is not aligned to 16 bytes");
  host::Matrices own{row, r, cuda_host::self->number};
  cuda_host::warp_operation(CUDA_HOST_HERE("ldmatrix.trans"), 0xffffffffu, &own,
                            host::load_matrices<true>, false);
}

inline void copy_async(void* shared, const void* global, bool valid) {
  host::require(host::aligned_to_16(shared) && (!valid || host::aligned_to_16(global)),
                "cp.async: an address is not aligned to 16 bytes");
  cuda_host::copy_later(shared, global, 16, valid ? 16 : 0);
}
inline void copy_word_async(void* shared, const void* global, bool valid) {
  cuda_host::copy_later(shared, global, 4, valid ? 4 : 0);
}
inline void cp_async_commit() { cuda_host::close_group(); }
template <int OPEN> void cp_async_wait() { cuda_host::wait_for_groups(OPEN); }

inline float exp2_fast(float x) { return std::exp2(x); }

inline uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }
inline uint32_t load_once(const uint32_t* p) { return *p; }

namespace host {

inline uint32_t narrow(float x, __nv_bfloat16*) { return __float2bfloat16_rn(x).bits; }
inline uint32_t narrow(float x, __half*) { return __float2half_rn(x).bits; }

}  // namespace host

template <class T> uint32_t pack(float first, float second) {
  T* const type = nullptr;
  return host::narrow(first, type) | host::narrow(second, type) << 16;
}

template <class T> uint32_t add_pairs(uint32_t a, uint32_t b) {
  return pack<T>(host::element<T>(a, 0) + host::element<T>(b, 0),
                 host::element<T>(a, 1) + host::element<T>(b, 1));
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t pick) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i)
    picked |= uint32_t(bytes >> 8 * (pick >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
}
inline uint32_t pick_bytes_or_zero(uint32_t low, uint32_t high, uint32_t pick) {
  uint32_t picked = pick_bytes(low, high, pick);
  for (int i = 0; i < 4; ++i)
    if (pick >> 4 * i & 8) picked &= ~(0xffu << 8 * i);
  return picked;
}

}  // namespace llama_fast::cuda
