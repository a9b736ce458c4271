// Tiles of keys and values in 8 bits in shared memory, and their products with matrices in registers.
//
// Float16 holds the integers exactly, so they are converted to it on their way into the matrix instructions,
// whatever the type of q. Of a lane's operands the instruction says only which row of A meets which
// column of B, so which element of a sum stands where is chosen such that a lane takes whole runs of
// bytes, and none is moved between lanes:
//     scores  lane t of a quad has the columns 64c + 16t … + 15 of its key, four instructions' worth,
//             and of the queries the same
//     output  lane g of eight has the columns g · D/8 … of its four keys, one for each instruction; so
//             column 8n + i of the product is column i · D/8 + n of the output
// The 16-byte chunks of a tile lie in the order in which the lanes of a warp take them.
#pragma once

#include <common/launch.cuh>
#include <common/ptx.cuh>

#include "../common/reduce.cuh"
#include "../common/dequantize.cuh"

namespace llama_fast::cuda {

constexpr int QUANTIZED_KEYS = 32;

template <int D> struct QuantizedTile {
  int8_t k[QUANTIZED_KEYS * D], v[QUANTIZED_KEYS * D];
  float k_scales[QUANTIZED_KEYS], v_scales[QUANTIZED_KEYS];
};

// Starts the copy of the keys from `first` on; zeros for those from `end` on, which are not read.
template <int D>
__device__ __forceinline__ void copy_quantized_keys(int8_t* tile, const int8_t* source, int64_t stride,
                                                int first, int end, int lane) {
  int key = first + lane / 4;
  source += key * stride + lane % 4 * 16;
#pragma unroll
  for (int n = 0; n < QUANTIZED_KEYS / 8; ++n, key += 8, source += 8 * stride)
#pragma unroll
    for (int c = 0; c < D / 64; ++c)
      copy_async(tile + ((n * (D / 64) + c) * WARP + lane) * 16, source + c * 64, key < end);
}

// The same of values. Those of each four keys lie together: of 16 keys 2t, which are the first of the
// weights that lane t of a quad holds, then 2t + 1, 2t + 8 and 2t + 9.
template <int D>
__device__ __forceinline__ void copy_quantized_values(int8_t* tile, const int8_t* source,
                                                  int64_t stride, int first, int end, int lane) {
  constexpr int FOURS = WARP / 4 / (D / 16);  // that a warp copies at once
  int key = first + lane % 4 * 2 + lane / 4 / (D / 16);
  source += key * stride + lane / 4 % (D / 16) * 16;
#pragma unroll
  for (int i = 0; i < QUANTIZED_KEYS / 4 / FOURS; ++i) {
    copy_async(tile + (i * WARP + lane) * 16, source, key < end);
    const int step = FOURS == 2 ? 8 : i % 2 ? 7 : 1;
    key += step;
    source += step * stride;
  }
}

// The same of scales, of any stride.
__device__ __forceinline__ void copy_scales(float* tile, const float* source, int64_t stride,
                                            int first, int end, int lane) {
  static_assert(QUANTIZED_KEYS == WARP, "one for each lane");
  copy_word_async(tile + lane, source + (first + lane) * stride, first + lane < end);
}

// Signed bytes as two pairs.
__device__ __forceinline__ void dequantize_values(uint32_t qdata, uint32_t& first, uint32_t& second) {
  dequantize_bytes<f16>(qdata ^ 0x80808080u, 128, first, second);  // as bytes above -128
}

// The 16 rows of q of a warp as the A of its products with integers. Row g + 8i is `v` times step[i].
template <int D> struct QuantizedQueries {
  uint32_t v[D / 16][4];
  float step[2];
};

// A power of two that brings numbers up to `largest` below 2^15, and its inverse in `step`: float16 then
// holds bfloat16's numbers exactly, down to 2^-31 of the largest.
__device__ __forceinline__ float to_float16_range(float largest, float& step) {
  uint32_t bits;
  memcpy(&bits, &largest, sizeof bits);
  const uint32_t exponent = max(bits >> 23, 15u);  // 127 above that of two
  const uint32_t factor_bits = (127 + 14 + 127 - exponent) << 23, step_bits = (exponent - 14) << 23;
  float factor;
  memcpy(&factor, &factor_bits, sizeof factor);
  memcpy(&step, &step_bits, sizeof step);
  return factor;
}

// `row[i]` is row g + 8i of the warp's, or null for zeros.
template <int D, class T>
__device__ __forceinline__ QuantizedQueries<D> load_quantized_queries(const T* const (&row)[2], int t) {
  QuantizedQueries<D> q;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float x[D / 64][16] = {};
    float largest = 0.0f;
    if (row[i]) {
#pragma unroll
      for (int c = 0; c < D / 64; ++c) {
        const Pack<T, 16> run = load<16>(row[i] + c * 64 + t * 16);
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          x[c][e] = to_float(run.v[e]);
          largest = fmaxf(largest, fabsf(x[c][e]));
        }
      }
    }
    float factor = 1.0f;
    q.step[i] = 1.0f;
    if constexpr (!std::is_same_v<T, f16>) factor = to_float16_range(quad_max(largest), q.step[i]);
#pragma unroll
    for (int c = 0; c < D / 64; ++c)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          q.v[c * 4 + m][i + 2 * j] = pack<f16>(x[c][m * 4 + 2 * j] * factor,
                                                x[c][m * 4 + 2 * j + 1] * factor);
  }
  return q;
}

// scores (16, QUANTIZED_KEYS) = q · qdataᵀ, as C of the matrix instruction.
template <int D>
__device__ __forceinline__ void multiply_quantized_keys(float (&scores)[QUANTIZED_KEYS / 8][4],
                                                    const QuantizedQueries<D>& q, const int8_t* tile,
                                                    int lane) {
#pragma unroll
  for (int n = 0; n < QUANTIZED_KEYS / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] = 0.0f;
#pragma unroll
    for (int c = 0; c < D / 64; ++c) {
      const int8_t* chunk = tile + ((n * (D / 64) + c) * WARP + lane) * 16;
      const uint4 qdata = *reinterpret_cast<const uint4*>(chunk);
      const uint32_t word[4] = {qdata.x, qdata.y, qdata.z, qdata.w};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t b[2];
        dequantize_values(word[m], b[0], b[1]);
        mma_16x8x16<f16>(scores[n], q.v[c * 4 + m], b);
      }
    }
  }
}

// o (16, D) += weights · qdata, the weights as multiply_quantized_keys left the scores.
template <int D>
__device__ __forceinline__ void multiply_quantized_values(float (&o)[D / 8][4],
                                                      const float (&weights)[QUANTIZED_KEYS / 8][4],
                                                      const int8_t* tile, int lane) {
  constexpr int BYTES = D / 8, WORDS = BYTES / 4;  // of a lane, for a key
#pragma unroll
  for (int k = 0; k < QUANTIZED_KEYS / 16; ++k) {
    const float(&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pack<f16>(left[0], left[1]), pack<f16>(left[2], left[3]),
                           pack<f16>(right[0], right[1]), pack<f16>(right[2], right[3])};
    uint32_t qdata[4][WORDS];  // of the lane's keys
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int byte = lane / 4 * BYTES;  // of the key
      const int8_t* own = tile + ((k * 4 + j) * (D / 16) + byte / 16) * 64 + lane % 4 * 16;
      const Pack<uint32_t, WORDS> words =
          load<WORDS>(reinterpret_cast<const uint32_t*>(own + byte % 16));
#pragma unroll
      for (int w = 0; w < WORDS; ++w) qdata[j][w] = words.v[w];
    }
#pragma unroll
    for (int w = 0; w < WORDS; ++w)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the four columns of a word
        const uint32_t pick = half ? 0x7362 : 0x5140;  // two columns of two keys, in turn
        uint32_t b[2][2];
        dequantize_values(pick_bytes(qdata[0][w], qdata[1][w], pick), b[0][0], b[1][0]);
        dequantize_values(pick_bytes(qdata[2][w], qdata[3][w], pick), b[0][1], b[1][1]);
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_16x8x16<f16>(o[w * 4 + half * 2 + j], a, b[j]);
      }
  }
}

}  // namespace llama_fast::cuda
