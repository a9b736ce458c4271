// Bytes as numbers of a half type, exactly.
#pragma once

#include <common/ptx.cuh>

#include "numeric.cuh"

namespace llama_fast::cuda {

// The numbers of 4 bytes as two pairs, less the centre.
template <class T> __device__ __forceinline__ void dequantize_bytes(uint32_t bytes, int centre,
                                                               uint32_t& first, uint32_t& second);

// A byte below 1024's lowest bits is 1024 + byte in float16; the difference is exact.
template <>
__device__ __forceinline__ void dequantize_bytes<f16>(uint32_t bytes, int centre, uint32_t& first,
                                                 uint32_t& second) {
  constexpr uint32_t MAGIC = 0x64646464;
  const uint32_t less = 0xe400e400 | centre * 0x00010001;  // -(1024 + centre), twice
  first = add_pairs<f16>(pick_bytes(bytes, MAGIC, 0x4140), less);
  second = add_pairs<f16>(pick_bytes(bytes, MAGIC, 0x4342), less);
}

// bfloat16 has too few bits for that; in a float, 2^23 + byte has them.
template <>
__device__ __forceinline__ void dequantize_bytes<bf16>(uint32_t bytes, int centre, uint32_t& first,
                                                  uint32_t& second) {
  constexpr uint32_t MAGIC = 0x4b000000;
  float number[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = pick_bytes(bytes, MAGIC, 0x7440 | i);
    memcpy(&number[i], &bits, sizeof bits);
    number[i] -= 8388608.0f + centre;
  }
  first = pack<bf16>(number[0], number[1]);
  second = pack<bf16>(number[2], number[3]);
}

}  // namespace llama_fast::cuda
