// One element of SwiGLU, with its two roundings; swiglu.cu and linear/gemv.cuh call it.
#pragma once

#include "common/numeric.cuh"

namespace llama_fast::cuda {

template <class T> __device__ __forceinline__ T swiglu_of(T gate, T up) {
  const float z = to_float(gate);
  const T silu = from_float<T>(z / (1.0f + exponential<T>(-z)));
  return from_float<T>(to_float(silu) * to_float(up));
}

}  // namespace llama_fast::cuda
