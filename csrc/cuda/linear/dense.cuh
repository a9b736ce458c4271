// A weight of bfloat16 or float16, as gemv.cuh multiplies by it.
#pragma once

#include "gemv.cuh"

namespace llama_fast::cuda {

template <class T> struct DenseWeight {
  const T* weight;  // (rows, C_in) contiguous, aligned to 16 bytes
  int64_t columns;  // a multiple of 8

  struct Raw { Pairs low, high; };
  static constexpr __host__ __device__ int steps(int) { return 4; }

  const T *low_row = nullptr, *high_row = nullptr;
  __device__ __forceinline__ void start(int64_t low, int64_t high) {
    low_row = weight + low * columns;
    high_row = weight + high * columns;
  }

  // A weight is read once and leaves the cache to x.
  __device__ __forceinline__ Raw load(int64_t c) const {
    if (c >= columns) return {};
    return {pairs(load_once(low_row + c)), pairs(load_once(high_row + c))};
  }

  template <int TILES>
  __device__ __forceinline__ void multiply(float (&sum)[TILES][4], const Raw& raw,
                                           const Pairs (&x)[TILES], int64_t) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) cuda::multiply<T>(sum[i], raw.low, raw.high, x[i]);
  }
};

template <bool GATED>
void launch_dense(const Target& target, const char* name, const LinearArgs& a) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    const DenseWeight<T> weight{static_cast<const T*>(a.weight), a.C_in};
    launch_linear<T, GATED>(target, name, a.x, a.rows, weight, a.y, a.C_in, a.C_out);
  };
  if (a.dtype == DType::bf16) run(Type<bf16>{});
  else run(Type<f16>{});
}

}  // namespace llama_fast::cuda
