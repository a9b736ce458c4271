// Two vectors at once, for work on elements that are alike: of bf16 the even and the odd elements,
// which takes fewer instructions, of the other types the first and the second half.
#pragma once

#include <type_traits>

#include "simd.h"

namespace llama_fast {
namespace ISA {

struct vf2 { vf a, b; };

template <class T> static inline vf2 load2(const T* p) { return {load(p), load(p + vf::W)}; }
template <class T> static inline void store2(T* p, vf2 x) {
  store(p, x.a);
  store(p + vf::W, x.b);
}
static inline vf2 load2(const bf16* p) {
  vf2 x;
  load_split(p, x.a, x.b);
  return x;
}
static inline void store2(bf16* p, vf2 x) { store_split(p, x.a, x.b); }
// Floats in the order in which load2 has the elements of a T.
template <class T> static inline vf2 load2_beside(const float* p) {
  vf2 x = load2(p);
  if constexpr (std::is_same_v<T, bf16>) part(x.a, x.b, x.a, x.b);
  return x;
}

// x in every lane, of as many vectors as the first argument has.
static inline vf set_like(vf, float x) { return set(x); }
static inline vf2 set_like(vf2, float x) { return {set(x), set(x)}; }

static inline vf2 operator+(vf2 x, vf2 y) { return {x.a + y.a, x.b + y.b}; }
static inline vf2 operator+(vf x, vf2 y) { return {x + y.a, x + y.b}; }
static inline vf2 operator-(vf2 x, vf2 y) { return {x.a - y.a, x.b - y.b}; }
static inline vf2 operator-(vf x, vf2 y) { return {x - y.a, x - y.b}; }
static inline vf2 operator*(vf2 x, vf2 y) { return {x.a * y.a, x.b * y.b}; }
static inline vf2 operator*(vf2 x, vf y) { return {x.a * y, x.b * y}; }
static inline vf2 operator/(vf2 x, vf2 y) { return {x.a / y.a, x.b / y.b}; }
static inline vf2 fma(vf2 x, vf2 y, vf2 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
static inline vf2 max(vf2 x, vf2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
static inline vf2 sqrt(vf2 x) { return {sqrt(x.a), sqrt(x.b)}; }
static inline vf2 exp(vf2 x) { return {exp(x.a), exp(x.b)}; }
static inline vf2 exp_half(vf2 x) { return {exp_half(x.a), exp_half(x.b)}; }
static inline vf2 divide_half(vf2 x, vf2 y) {
  return {divide_half(x.a, y.a), divide_half(x.b, y.b)};
}

// The inverse of load2_beside.
template <class T> static inline void store2_beside(float* p, vf2 x) {
  if constexpr (std::is_same_v<T, bf16>) join(x.a, x.b, x.a, x.b);
  store2(p, x);
}

struct Pair {};
template <class T> static inline vf2 load(const T* p, Pair) { return load2(p); }
template <class T> static inline void store(T* p, vf2 x, Pair) { store2(p, x); }
template <class T> static inline vf2 load_beside(const float* p, Pair) { return load2_beside<T>(p); }
template <class T, class Width> static inline vf load_beside(const float* p, Width width) {
  return load(p, width);
}
template <class T> static inline void store_beside(float* p, vf2 x, Pair) { store2_beside<T>(p, x); }
template <class T, class Width> static inline void store_beside(float* p, vf x, Width width) {
  store(p, x, width);
}

// for_each_vector, with as many pairs of vectors as there are first, as f(i, Pair).
template <class F> static inline void for_each_pair(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 2 * vf::W <= n; i += 2 * vf::W) f(i, Pair{});
  for_each_vector(n - i, [&](int64_t j, auto width) { f(i + j, width); });
}

}  // namespace ISA
}  // namespace llama_fast
