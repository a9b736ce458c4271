// The rotation of one head by one position's angles, which rope and kv_append share.
#pragma once

#include <type_traits>

#include "simd/pair.h"

namespace llama_fast {
namespace ISA {

// y (D,) = x (D,) with the pairs (i, i + D/2) rotated; cos, sin (D/2,).
template <class T>
static inline void rotate_halves(const T* x, const float* cos, const float* sin, T* y, int64_t D) {
  const int64_t half = D / 2;
  for_each_vector(half, [&](int64_t i, auto width) {
    const vf a = load(x + i, width), b = load(x + half + i, width);
    const vf c = load(cos + i, width), s = load(sin + i, width);
    store(y + i, a * c - b * s, width);
    store(y + half + i, fma(b, c, a * s), width);
  });
}

// y (D,) = x (D,) with the pairs (2i, 2i + 1) rotated; cos, sin (D/2,).
template <class T>
static inline void rotate_pairs(const T* x, const float* cos, const float* sin, T* y, int64_t D) {
  int64_t done = 0;
  if constexpr (vf::W == 1 || std::is_same_v<T, bf16>) {
    // load2 takes the pairs apart.
    for (; done + 2 * vf::W <= D; done += 2 * vf::W) {
      const vf2 v = load2(x + done);
      const vf c = load(cos + done / 2), s = load(sin + done / 2);
      store2(y + done, {v.a * c - v.b * s, fma(v.b, c, v.a * s)});
    }
  }
  if constexpr (vf::W > 1) {
    // With every angle twice, even lanes take a·cos - b·sin and odd ones b·cos + a·sin.
    for_each_vector(D - done, [&](int64_t j, auto width) {
      const int64_t i = done + j;
      const auto v = load(x + i, width);
      const vf c = load_twice(cos + i / 2, width), s = load_twice(sin + i / 2, width);
      store(y + i, fma_alternating(v, c, swap_pairs(v) * s), width);
    });
  }
}

// One token's heads, each of D contiguous elements.
template <class T>
static inline void rotate_heads(const T* x, int64_t heads, int64_t x_stride, const float* cos,
                                const float* sin, T* y, int64_t y_stride, int64_t D,
                                bool interleaved) {
  for (int64_t h = 0; h < heads; ++h) {
    if (interleaved) rotate_pairs(x + h * x_stride, cos, sin, y + h * y_stride, D);
    else rotate_halves(x + h * x_stride, cos, sin, y + h * y_stride, D);
  }
}

// Tokens for one thread at least, so that sharing them pays.
static inline int64_t rope_grain(int64_t heads, int64_t D) { return 1 + 16384 / (heads * D + 1); }

}  // namespace ISA
}  // namespace llama_fast
