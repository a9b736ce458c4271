// What the ways to multiply by quantised weights share: rows of x in bytes, tile after tile, and what
// becomes of the sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"
#include "quantized_weight.h"

namespace llama_fast {
namespace ISA {

static constexpr int64_t PIECE_BYTES = 1 << 16;  // of qdata, about: see parallel_for_then_pieces

// Calls f(m, MT) for so many tiles of M rows, as even as can be.
template <class F> static inline void for_each_tile(int64_t M, int64_t tiles, F&& f) {
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = M * i / tiles, end = M * (i + 1) / tiles;
    f(begin, int(end - begin));
  }
}

// A tile of MT rows of x as the products take them: (groups, MT * group_size) bytes, and its scales,
// sums and starts, which are (groups, MT).
struct Activations {
  int8_t* bytes;
  float* scales;
  float* sums;      // scale · Σ bytes of the group, for the minima
  int32_t* starts;  // where the sum of a group starts: what takes the bytes' centre off again
};

// One group of one row of x, to signed bytes: q = round(x / scale), scale = max |x| / 127.
struct Rounded { float scale, sum; };
static inline Rounded round_group(const float* x, int64_t n, int8_t* q) {
  vf largest = zero(), check = zero();
  for (int64_t i = 0; i < n; i += vf::W) {
    const vf value = load(x + i);
    largest = max(largest, max(value, zero() - value));
    check = fma(value, zero(), check);  // NaN where any value is NaN or infinite
  }
  const float scale = max_of(largest) / 127.f + sum(check);
  if (!(scale > 0.f)) {  // all zero, or not finite
    std::memset(q, 0, size_t(n));
    return {scale, scale};
  }
  vf total = zero();
  for (int64_t i = 0; i < n; i += vf::W) {
    const vf rounded = round(load(x + i) / set(scale));
    store_bytes(q + i, rounded);
    total = total + rounded;
  }
  return {scale, sum(total)};
}

// How the bytes of a group of a tile lie: row after row, or four columns of all rows after four columns.
enum class Lie { by_row, by_four };

// All rows, tile after tile, without their offsets.
template <class T> class RoundedRows {
 public:
  RoundedRows(const LinearQuantizedArgs& args, const Shape& shape, int64_t row, int64_t rows,
              int64_t tile_count, int64_t chunk_groups, Lie lie)
      : a_(args), s_(shape), row0_(row), M_(rows), tiles_(tile_count), chunk_(chunk_groups), lie_(lie) {
    const int64_t each = M_ * s_.groups;
    float* memory = scratch<Activations>(3 * each + M_ * s_.columns / 4 + SPARE);
    all_ = {reinterpret_cast<int8_t*>(memory + 3 * each), memory, memory + each,
            reinterpret_cast<int32_t*>(memory + 2 * each)};
    // A thread takes groups, not rows: rows may share lines of memory, of which each has one writer.
    const int64_t n = tiles_ * s_.groups, row_tile = (M_ + tiles_ - 1) / tiles_;
    parallel_for(n, 1 + ROUNDED_BY_A_THREAD / (s_.group_size * row_tile), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t tile = begin / s_.groups, after = std::min(end, (tile + 1) * s_.groups);
        const int64_t m0 = M_ * tile / tiles_, m1 = M_ * (tile + 1) / tiles_;
        round(m0, int(m1 - m0), begin - tile * s_.groups, after - tile * s_.groups);
        begin = after;
      }
    });
  }

  // Of the tile of rows m0 … m0 + MT, from group g on. What is read behind its last row is memory too.
  Activations tile(int64_t m0, int MT, int64_t g) const {
    const int64_t chunk = g / chunk_ * chunk_, groups = std::min(chunk_, s_.groups - chunk);
    const int64_t at = chunk * M_ + m0 * groups + (g - chunk) * MT;
    return {all_.bytes + at * s_.group_size, all_.scales + at, all_.sums + at, all_.starts + at};
  }

 private:
  static constexpr int64_t SPARE = 16 * 128 / 4;
  static constexpr int64_t ROUNDED_BY_A_THREAD = 1 << 15;  // elements, at least: some 25 µs

  void round(int64_t m0, int MT, int64_t g_begin, int64_t g_end) const {
    alignas(64) float values[128];
    alignas(64) int8_t q[128];
    const int bias = a_.weight.bits == 4 ? BIAS<SmallByte> : BIAS<Byte>, centre = centre_of(a_.weight);
    for (int m = 0; m < MT; ++m) {
      const T* x = static_cast<const T*>(a_.x) + a_.rows.offset(row0_ + m0 + m);
      for (int64_t g = g_begin; g < g_end; ++g) {
        const Activations to = tile(m0, MT, g);
        const int64_t begin = g * s_.group_size, n = std::min(s_.group_size, a_.weight.C_in - begin);
        for_each_vector(n, [&](int64_t i, auto width) {
          store(values + i, load(x + begin + i, width));
        });
        std::fill(values + n, values + s_.group_size, 0.f);
        int8_t* in_place = to.bytes + m * s_.group_size;
        const Rounded r = round_group(values, s_.group_size, lie_ == Lie::by_row ? in_place : q);
        to.scales[m] = r.scale;
        to.sums[m] = r.scale * r.sum;
        to.starts[m] = std::isfinite(r.sum) ? int32_t(r.sum) * (bias - centre) : 0;
        if (lie_ == Lie::by_row) continue;
        for (int64_t i = 0; i < s_.group_size; i += 4)
          std::memcpy(to.bytes + i * MT + 4 * m, q + i, 4);
      }
    }
  }

  const LinearQuantizedArgs& a_;
  const Shape& s_;
  int64_t row0_, M_, tiles_, chunk_;
  Lie lie_;
  Activations all_;
};

// Blocks n0 … n0 + NT of y: the rows' totals, rounded.
template <class T>
static void write(const float* total, const LinearQuantizedArgs& a, int64_t row0, int64_t rows,
                  int64_t n0, int NT) {
  const int64_t begin = n0 * BLOCK, n = std::min<int64_t>(NT * BLOCK, a.weight.C_out - begin);
  for (int64_t m = 0; m < rows; ++m) {
    T* y = static_cast<T*>(a.y) + (row0 + m) * a.weight.C_out + begin;
    const float* t = total + m * NT * BLOCK;
    for_each_vector(n, [&](int64_t i, auto width) { store(y + i, load(t + i), width); });
  }
}

}  // namespace ISA
}  // namespace llama_fast
