// The element types, their conversions to float and back, and accesses of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../kernels.h"

namespace llama_fast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

// Rounds to nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// e^x: for the half types the faster instruction, whose error is far below their rounding.
template <class T> __device__ __forceinline__ float exponential(float x) { return __expf(x); }
template <> __device__ __forceinline__ float exponential<float>(float x) { return expf(x); }

// Elements of an access of 16 bytes.
template <class T> constexpr int VECTOR = 16 / sizeof(T);

template <class T, int COUNT> struct Pack { T v[COUNT]; };

// What one access moves of so many bytes.
template <size_t BYTES> struct AccessOf { using type = uint4; };
template <> struct AccessOf<8> { using type = uint2; };
template <> struct AccessOf<4> { using type = uint32_t; };

// COUNT elements from p on; more than one in accesses of 16 bytes, or of all there are, to which p is
// aligned then.
template <int COUNT, class T> __device__ __forceinline__ Pack<T, COUNT> load(const T* p) {
  Pack<T, COUNT> pack;
  if constexpr (COUNT == 1) {
    pack.v[0] = *p;
  } else {
    using Access = typename AccessOf<sizeof(pack)>::type;
    static_assert(sizeof(pack) % sizeof(Access) == 0, "whole accesses");
#pragma unroll
    for (size_t i = 0; i < sizeof(pack) / sizeof(Access); ++i) {
      const Access bits = reinterpret_cast<const Access*>(p)[i];
      memcpy(static_cast<void*>(&pack.v[i * sizeof(Access) / sizeof(T)]), &bits, sizeof bits);
    }
  }
  return pack;
}

template <class T, int COUNT>
__device__ __forceinline__ void store(T* p, const Pack<T, COUNT>& pack) {
  if constexpr (COUNT == 1) {
    *p = pack.v[0];
  } else {
    using Access = typename AccessOf<sizeof(pack)>::type;
    static_assert(sizeof(pack) % sizeof(Access) == 0, "whole accesses");
#pragma unroll
    for (size_t i = 0; i < sizeof(pack) / sizeof(Access); ++i) {
      Access bits;
      memcpy(&bits, static_cast<const void*>(&pack.v[i * sizeof(Access) / sizeof(T)]), sizeof bits);
      reinterpret_cast<Access*>(p)[i] = bits;
    }
  }
}

// ---- on the host: which instance of a kernel to launch ----

template <class T> struct Type { using type = T; };

// Calls `with` with the Type of the dtype.
template <class With> void with_type(DType dtype, With with) {
  if (dtype == DType::f32) with(Type<float>{});
  else if (dtype == DType::bf16) with(Type<bf16>{});
  else with(Type<f16>{});
}

// Whether all these pointers are aligned to 16 bytes.
inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

// Whether all these strides, in elements, are whole vectors of `vector` elements.
inline bool whole(int vector, std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides)
    if (stride % vector != 0) return false;
  return true;
}

inline bool whole(int vector, const Rows& rows) {
  return whole(vector, {rows.stride0, rows.stride1, rows.stride2});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llama_fast::cuda
