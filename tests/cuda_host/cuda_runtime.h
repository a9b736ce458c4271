// The part of CUDA C++ that the kernels use, on the host: see machine.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL

#define threadIdx (::cuda_host::self->thread_index)
#define blockIdx (::cuda_host::self->block_index)
#define blockDim (::cuda_host::self->block_size)
#define gridDim (::cuda_host::self->grid_size)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }

#define CUDA_HOST_HERE(WHAT) \
  ::cuda_host::Place { WHAT, file, line }
#define CUDA_HOST_CALLED_FROM int line = __builtin_LINE(), const char* file = __builtin_FILE()

inline void __syncthreads(CUDA_HOST_CALLED_FROM) {
  cuda_host::block_barrier(CUDA_HOST_HERE("__syncthreads"));
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, CUDA_HOST_CALLED_FROM) {
  cuda_host::warp_operation(CUDA_HOST_HERE("__syncwarp"), mask, nullptr, nullptr, true);
}

namespace cuda_host {

// What a lane brings to a shuffle or a vote: its value, whose value it wants, and room for it.
struct Exchange {
  uint64_t value;
  int source;
  uint64_t result;
};

// Every lane gets the value of its source; its own where no lane of the mask is there.
inline void exchange(void* const* all) {
  for (int i = 0; i < WARP; ++i) {
    auto* own = static_cast<Exchange*>(all[i]);
    if (!own) continue;
    const auto* other = own->source < WARP ? static_cast<Exchange*>(all[own->source]) : nullptr;
    own->result = other ? other->value : own->value;
  }
}

template <class T> T shuffle(const Place& place, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "of a register");
  Exchange own{0, source, 0};
  std::memcpy(&own.value, &value, sizeof value);
  warp_operation(place, mask, &own, exchange, false);
  std::memcpy(&value, &own.result, sizeof value);
  return value;
}

inline void vote(void* const* all) {
  uint64_t ballot = 0;
  for (int i = 0; i < WARP; ++i)
    if (all[i] && static_cast<Exchange*>(all[i])->value) ballot |= uint64_t(1) << i;
  for (int i = 0; i < WARP; ++i)
    if (all[i]) static_cast<Exchange*>(all[i])->result = ballot;
}

inline uint32_t ballot(const Place& place, uint32_t mask, bool value) {
  Exchange own{value, 0, 0};
  warp_operation(place, mask, &own, vote, false);
  return static_cast<uint32_t>(own.result);
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, CUDA_HOST_CALLED_FROM) {
  return cuda_host::shuffle(CUDA_HOST_HERE("__shfl_sync"), mask, value, lane % cuda_host::WARP);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int with, CUDA_HOST_CALLED_FROM) {
  const int lane = cuda_host::self->number % cuda_host::WARP;
  return cuda_host::shuffle(CUDA_HOST_HERE("__shfl_xor_sync"), mask, value, lane ^ with);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, CUDA_HOST_CALLED_FROM) {
  const int lane = cuda_host::self->number % cuda_host::WARP;
  return cuda_host::shuffle(CUDA_HOST_HERE("__shfl_down_sync"), mask, value, lane + int(by));
}
inline uint32_t __ballot_sync(uint32_t mask, bool value, CUDA_HOST_CALLED_FROM) {
  return cuda_host::ballot(CUDA_HOST_HERE("__ballot_sync"), mask, value);
}
inline bool __any_sync(uint32_t mask, bool value, CUDA_HOST_CALLED_FROM) {
  return cuda_host::ballot(CUDA_HOST_HERE("__any_sync"), mask, value) != 0;
}
inline bool __all_sync(uint32_t mask, bool value, CUDA_HOST_CALLED_FROM) {
  return cuda_host::ballot(CUDA_HOST_HERE("__all_sync"), mask, !value) == 0;
}

// Fibres give way at barriers only, so plain accesses are atomic and in order.
template <class T> T atomicAdd(T* p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}
inline void __threadfence() {}
