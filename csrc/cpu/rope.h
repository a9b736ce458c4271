// The rotation of one head by one position's angles, which rope and kv_append share.
#pragma once

#include <type_traits>

#include "kernel_choice.h"
#include "simd/pair.h"

namespace llama_fast {
namespace ISA {

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

// Each head's y (D,) = x (D,) with the pairs (i, i + D/2) rotated; cos, sin (D/2,). The angles are
// put beside the elements once for all heads.
template <class T>
static inline void rotate_halves(const T* x, int64_t heads, int64_t x_stride, const float* cos,
                                 const float* sin, T* y, int64_t y_stride, int64_t D) {
  constexpr int64_t PART = 128;  // of D/2: all of it up to D = 256
  const int64_t half = D / 2;
  alignas(64) float c[PART], s[PART];
  for (int64_t first = 0; first < half; first += PART) {
    const int64_t n = half - first < PART ? half - first : PART;
    for_each_pair(n, [&](int64_t i, auto width) {
      store(c + i, load_beside<T>(cos + first + i, width), width);
      store(s + i, load_beside<T>(sin + first + i, width), width);
    });
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = x + h * x_stride + first;
      T* to = y + h * y_stride + first;
      for_each_pair(n, [&](int64_t i, auto width) {
        const auto a = load(from + i, width), b = load(from + half + i, width);
        const auto ci = load(c + i, width), si = load(s + i, width);
        store(to + i, a * ci - b * si, width);
        store(to + half + i, fma(b, ci, a * si), width);
      });
    }
  }
}

// One token's heads, each of D contiguous elements. Those of the token that comes next, `ahead`, are
// fetched meanwhile.
template <class T>
static inline void rotate_heads(const T* x, const T* ahead, int64_t heads, int64_t x_stride,
                                const float* cos, const float* sin, T* y, int64_t y_stride,
                                int64_t D, bool interleaved) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < D; i += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(ahead + h * x_stride + i);
  if (!interleaved) return rotate_halves(x, heads, x_stride, cos, sin, y, y_stride, D);
  for (int64_t h = 0; h < heads; ++h)
    rotate_pairs(x + h * x_stride, cos, sin, y + h * y_stride, D);
}

// Tokens for one thread at least, so that sharing them pays.
static inline int64_t rope_grain(int64_t heads, int64_t D) {
  return 1 + ELEMENTS_OF_A_THREAD / (heads * D + 1);
}

}  // namespace ISA
}  // namespace llama_fast
