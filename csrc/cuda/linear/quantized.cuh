// A weight of 8-bit or 4-bit integers with a scale, and perhaps an offset, for each group of columns of a
// row, as gemv.cuh multiplies by it. llama_fast/ops/quantized_layout.py says how it is laid out.
//
// What the integers stand for are whole numbers that bfloat16 and float16 hold exactly, so the products
// of a step are summed without any rounding of the weights, and x is not rounded to 8 bits as the op
// allows; the scale multiplies the sum of each step of 32 columns, which lies in one group. Offsets
// multiply the sum of x, which comes from a matrix of ones.
#pragma once

#include "../common/dequantize.cuh"
#include "gemv.cuh"

namespace llama_fast::cuda {

// Two bytes below 128, which `pick` takes and puts a byte of MAGIC above each, as numbers less the centre.
template <class T>
__device__ __forceinline__ uint32_t small_bytes(uint32_t bytes, uint32_t pick, int centre) {
  // 1024 + byte in float16, and 128 + byte in bfloat16, end in the byte; the difference is exact.
  constexpr bool HALF = std::is_same_v<T, f16>;
  constexpr uint32_t MAGIC = HALF ? 0x64646464 : 0x43434343, LESS = HALF ? 0xe400e400 : 0xc300c300;
  return add_pairs<T>(pick_bytes(bytes, MAGIC, pick), LESS | centre * 0x00010001);
}

constexpr int LEVEL_OF_ZERO = 64;  // above the lowest

// The levels of the low four nibbles above the lowest, a byte each: of nibbles below 8 from one table, of the
// others from a second one.
__device__ __forceinline__ uint32_t levels_of(uint32_t nibbles) {
  return pick_bytes_or_zero(0x1e150b00, 0x3a342d26, nibbles) |
         pick_bytes_or_zero(0x534c4640, 0x756b625a, nibbles ^ 0x8888);
}

// The numbers of a word of 8 nibbles, as four pairs: a byte has column k in its low half, k + 4 in its high.
template <class T, bool LEVELS> __device__ __forceinline__ Pairs dequantize_nibbles(uint32_t word) {
  if constexpr (LEVELS) {
    const uint32_t even = levels_of(word), odd = levels_of(word >> 16);  // columns 0 4 1 5, 2 6 3 7
    return {{small_bytes<T>(even, 0x4240, LEVEL_OF_ZERO), small_bytes<T>(odd, 0x4240, LEVEL_OF_ZERO),
             small_bytes<T>(even, 0x4341, LEVEL_OF_ZERO), small_bytes<T>(odd, 0x4341, LEVEL_OF_ZERO)}};
  } else {
    const uint32_t low = word & 0x0f0f0f0f, high = word >> 4 & 0x0f0f0f0f;
    return {{small_bytes<T>(low, 0x4140, 0), small_bytes<T>(low, 0x4342, 0),
             small_bytes<T>(high, 0x4140, 0), small_bytes<T>(high, 0x4342, 0)}};
  }
}

constexpr int LAID_ROWS = 16;  // that are interleaved

template <class T, int BITS, bool OFFSETS> struct PackedWeight {
  const uint8_t* qdata;   // (NB, C_pad / (32 / BITS), 16, 4)
  const __half* scales;   // (NB, groups, 16)
  const __half* offsets;  // the same, or null
  int64_t columns;        // C_pad
  int64_t groups;
  int group_shift;  // log2 of the columns of a group

  static constexpr int WORDS = BITS / 4;  // of four bytes, for 8 columns of a row
  // 1.0 twice.
  static constexpr uint32_t ONES = std::is_same_v<T, f16> ? 0x3c003c00u : 0x3f803f80u;

  struct Raw {
    uint32_t low[WORDS], high[WORDS];
    __half low_scale, high_scale, low_offset, high_offset;
  };

  static constexpr __host__ __device__ int steps(int tiles) { return tiles == 1 ? 4 : 2; }

  // Where the rows' first words lie, and their first scales.
  const uint32_t *low_word = nullptr, *high_word = nullptr;
  int64_t low_scale = 0, high_scale = 0;
  __device__ __forceinline__ void start(int64_t low, int64_t high) {
    const auto word = [&](int64_t row) {
      return reinterpret_cast<const uint32_t*>(qdata) +
             row / LAID_ROWS * (columns / 8 * WORDS) * LAID_ROWS + row % LAID_ROWS;
    };
    const auto scale = [&](int64_t row) {
      return row / LAID_ROWS * groups * LAID_ROWS + row % LAID_ROWS;
    };
    low_word = word(low);
    high_word = word(high);
    low_scale = scale(low);
    high_scale = scale(high);
  }

  __device__ __forceinline__ Raw load(int64_t c) const {
    Raw raw = {};
    if (c < columns) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const int64_t at = (c / 8 * WORDS + i) * LAID_ROWS;
        raw.low[i] = load_once(low_word + at);
        raw.high[i] = load_once(high_word + at);
      }
      const int64_t group = (c >> group_shift) * LAID_ROWS;
      raw.low_scale = scales[low_scale + group];
      raw.high_scale = scales[high_scale + group];
      if constexpr (OFFSETS) {
        raw.low_offset = offsets[low_scale + group];
        raw.high_offset = offsets[high_scale + group];
      }
    }
    return raw;
  }

  static __device__ __forceinline__ Pairs dequantize(const uint32_t (&words)[WORDS]) {
    if constexpr (BITS == 4) {
      return dequantize_nibbles<T, !OFFSETS>(words[0]);
    } else {
      constexpr int CENTRE = OFFSETS ? 0 : 128;
      Pairs pairs;
      dequantize_bytes<T>(words[0], CENTRE, pairs.v[0], pairs.v[1]);
      dequantize_bytes<T>(words[1], CENTRE, pairs.v[2], pairs.v[3]);
      return pairs;
    }
  }

  template <int TILES>
  __device__ __forceinline__ void multiply(float (&sum)[TILES][4], const Raw& raw,
                                           const Pairs (&x)[TILES], int64_t) const {
    const Pairs low = dequantize(raw.low), high = dequantize(raw.high);
    const float scale[2] = {to_float(raw.low_scale), to_float(raw.high_scale)};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      float of_step[4] = {};
      cuda::multiply<T>(of_step, low, high, x[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(scale[j / 2], of_step[j], sum[i][j]);
      if constexpr (OFFSETS) {
        const Pairs ones = {{ONES, ONES, ONES, ONES}};
        const float offset[2] = {to_float(raw.low_offset), to_float(raw.high_offset)};
        float of_x[4] = {};
        cuda::multiply<T>(of_x, ones, ones, x[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(offset[j / 2], of_x[j], sum[i][j]);
      }
    }
  }
};

template <class T, int BITS, bool OFFSETS, bool GATED>
void launch_packed(const Target& target, const char* name, const LinearQuantizedArgs& a) {
  const QuantizedWeight& w = a.weight;
  int shift = 0;
  while ((1 << shift) < w.group_size) ++shift;
  const int64_t groups = ceil_div(w.C_in, w.group_size);
  const PackedWeight<T, BITS, OFFSETS> weight{
      w.qdata, static_cast<const __half*>(w.scales),
      static_cast<const __half*>(w.minima), groups * w.group_size, groups, shift};
  launch_linear<T, GATED>(target, name, a.x, a.rows, weight, a.y, w.C_in, w.C_out);
}

template <bool GATED>
void launch_quantized(const Target& target, const char* name, const LinearQuantizedArgs& a) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    const bool bytes = a.weight.bits == 8, minima = a.weight.minima;
    if (bytes && minima) launch_packed<T, 8, true, GATED>(target, name, a);
    else if (bytes) launch_packed<T, 8, false, GATED>(target, name, a);
    else if (minima) launch_packed<T, 4, true, GATED>(target, name, a);
    else launch_packed<T, 4, false, GATED>(target, name, a);
  };
  if (a.dtype == DType::bf16) run(Type<bf16>{});
  else run(Type<f16>{});
}

}  // namespace llama_fast::cuda
