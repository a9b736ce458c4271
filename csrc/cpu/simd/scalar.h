// One float at a time: the definition of each vector operation, and every CPU's fallback.
#pragma once

#include <cmath>

#include "half.h"

namespace llama_fast {
namespace ISA {

struct vf {
  static constexpr int W = 1;
  float v;
};

static inline vf set(float x) { return {x}; }
static inline vf zero() { return {0.f}; }

template <class T> static inline vf load(const T* p) { return {to_float(*p)}; }
template <class T> static inline vf load(const T* p, int n) { return n ? load(p) : zero(); }
template <class T> static inline void store(T* p, vf x) { from_float(x.v, *p); }
template <class T> static inline void store(T* p, vf x, int n) { if (n) store(p, x); }

static inline vf keep(vf x) { return x; }

static inline vf operator+(vf a, vf b) { return {a.v + b.v}; }
static inline vf operator-(vf a, vf b) { return {a.v - b.v}; }
static inline vf operator*(vf a, vf b) { return {a.v * b.v}; }
static inline vf operator/(vf a, vf b) { return {a.v / b.v}; }
static inline vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
static inline vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }  // b where either is NaN
static inline vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
static inline float sum(vf a) { return a.v; }
static inline float max_of(vf a) { return a.v; }
static inline vf sqrt(vf a) { return {std::sqrt(a.v)}; }
static inline vf round(vf a) { return {std::nearbyintf(a.v)}; }
// a · 2^n for integral n in [-126, 128].
static inline vf scale2(vf a, vf n) {
  return {a.v * float_of(uint32_t(int32_t(n.v) + 127) << 23)};
}
// t = whole + part, whole integral and part in [0, 1); t clamped to where scale2 takes the whole:
// 2^128 is infinity to it.
static inline void floor_and_rest(vf t, vf& whole, vf& part) {
  t = min(max(t, {-126.f}), {128.f});
  whole = {std::floor(t.v)};
  part = t - whole;
}
// a / b, for what is rounded to a half type.
static inline vf divide_half(vf a, vf b) { return a / b; }

// Two bf16 of a word that came as a float.
static inline void split(vf word, vf& even, vf& odd) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, word.v);
  even = {float_of(bits << 16)};
  odd = {float_of(bits & 0xffff0000)};
}
static inline void load_split(const bf16* p, vf& even, vf& odd) {
  even = load(p);
  odd = load(p + 1);
}
static inline void load_split(const bf16* p, vf& even, vf& odd, int n) {
  even = load(p, n);
  odd = load(p + 1, n - 1);
}
static inline void store_split(bf16* p, vf even, vf odd) {
  store(p, even);
  store(p + 1, odd);
}
static inline void join(vf even, vf odd, vf& first, vf& second) {
  first = even;
  second = odd;
}
static inline void part(vf first, vf second, vf& even, vf& odd) {
  even = first;
  odd = second;
}
static inline void transpose(vf (&)[1]) {}

}  // namespace ISA
}  // namespace llama_fast
