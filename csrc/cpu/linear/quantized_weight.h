// A quantised weight as it lies: 16 rows to a block, of which a line has four bytes for each row, four or
// eight columns. llama_fast/ops/quantized_layout.py is the definition.
#pragma once

#include <algorithm>

#include "../../args.h"
#include "../simd/bytes.h"

namespace llama_fast {
namespace ISA {

static constexpr int BLOCK = 16;              // rows of W
static constexpr int V = BLOCK / vf::W;       // vectors of a line: four bytes for each row
static constexpr int LINE = BLOCK * 4;

// The shape of a weight, its columns filled up to whole groups.
struct Shape {
  int64_t columns, groups, group_size, blocks;
  int64_t qdata_bytes;  // of a block
  explicit Shape(const QuantizedWeight& w)
      : columns((w.C_in + w.group_size - 1) / w.group_size * w.group_size),
        groups(columns / w.group_size), group_size(w.group_size),
        blocks((w.C_out + BLOCK - 1) / BLOCK), qdata_bytes(columns * BLOCK * w.bits / 8) {}
};

// What a nibble stands for, as a byte: a level of a symmetric weight above the lowest, or itself.
// llama_fast/ops/quantized_layout.py has the levels' formula.
static constexpr uint8_t LEVELS[16] = {0,  11, 21, 30, 38, 45, 52,  58,
                                       64, 70, 76, 83, 90, 98, 107, 117};
static constexpr uint8_t PLAIN[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static inline Table bytes_of_nibbles(const QuantizedWeight& w) {
  return table_of(w.minima ? PLAIN : LEVELS);
}

// What the byte of a weight of zero is: 0 where there are minima.
static inline int centre_of(const QuantizedWeight& w) {
  return w.minima ? 0 : w.bits == 8 ? 128 : LEVELS[8];
}

// Calls f(i, numbers) for each column i of a line: what those rows of it stand for that `line` has.
template <int BITS, class F>
static inline void dequantize_line(vi line, Table table, vf scale, vf minimum, F&& f) {
  const auto four = [&](int i, vi bytes) {
    f(i, fma(to_float(byte_of<0>(bytes)), scale, minimum));
    f(i + 1, fma(to_float(byte_of<1>(bytes)), scale, minimum));
    f(i + 2, fma(to_float(byte_of<2>(bytes)), scale, minimum));
    f(i + 3, fma(to_float(byte_of<3>(bytes)), scale, minimum));
  };
  if constexpr (BITS == 8) {
    four(0, line);
  } else {
    four(0, look_up(table, low_nibbles(line)));
    four(4, look_up(table, high_nibbles(line)));
  }
}

// What is added to a scaled value.
static inline vf minimum_of(const f16* minima, vf scale, int centre) {
  return minima ? load(minima) : scale * set(float(-centre));
}

// A block's rows of W columns from `column` on, which lie in one group: (BLOCK, W).
template <int BITS>
static inline void dequantize_columns(const QuantizedWeight& w, const Shape& s, int64_t block,
                                      int64_t column, float* to) {
  constexpr int W = vf::W, COLUMNS = 32 / BITS;  // of a line
  const int64_t at = (block * s.groups + column / s.group_size) * BLOCK;
  const Table table = bytes_of_nibbles(w);
  const uint8_t* first = w.qdata + block * s.qdata_bytes + column / COLUMNS * LINE;
  for (int v = 0; v < V; ++v) {
    const int64_t scales = at + v * W;
    const vf scale = load(static_cast<const f16*>(w.scales) + scales);
    const f16* minima = w.minima ? static_cast<const f16*>(w.minima) + scales : nullptr;
    const vf minimum = minimum_of(minima, scale, centre_of(w));
    vf x[W];
#pragma GCC unroll 4
    for (int c = 0; c < W; c += COLUMNS) {
      const vi line = load_lanes(first + c / COLUMNS * LINE + v * 4 * W);
      dequantize_line<BITS>(line, table, scale, minimum, [&](int i, vf numbers) {
        if (W > 1) x[c + i] = numbers;
        else if (i == column % COLUMNS) x[0] = numbers;
      });
    }
    transpose(x);
    for (int r = 0; r < W; ++r) store(to + (v * W + r) * W, x[r]);
  }
}

}  // namespace ISA
}  // namespace llama_fast
