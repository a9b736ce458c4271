// Eight floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "half.h"

namespace llama_fast {
namespace ISA {

struct vf {
  static constexpr int W = 8;
  __m256 v;
};

static inline vf set(float x) { return {_mm256_set1_ps(x)}; }
static inline vf zero() { return {_mm256_setzero_ps()}; }

// Lanes below n set.
static inline __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The first n of 8 half-words, the others zero, without reading past them.
static inline __m128i load16(const void* p, int n) {
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, size_t(n) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
static inline __m128i load16(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
static inline void store16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
static inline void store16(void* p, __m128i x, int n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), x);
  std::memcpy(p, buffer, size_t(n) * 2);
}

static inline vf from_bf16(__m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
// Rounds to bf16 in the upper half of each lane; what the lower half holds is of no use.
static inline __m256i round_bf16(vf x) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  // A NaN, which the sum may have carried into a number, becomes the NaN of all ones.
  return _mm256_or_si256(r, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
}
static inline __m128i narrow_bf16(vf x) {
  const __m256i r = _mm256_srli_epi32(round_bf16(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

static inline vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline vf load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
static inline vf load(const bf16* p) { return from_bf16(load16(p)); }
static inline vf load(const bf16* p, int n) { return from_bf16(load16(p, n)); }
static inline vf load(const f16* p) { return {_mm256_cvtph_ps(load16(p))}; }
static inline vf load(const f16* p, int n) { return {_mm256_cvtph_ps(load16(p, n))}; }

static inline void store(float* p, vf x) { _mm256_storeu_ps(p, x.v); }
static inline void store(float* p, vf x, int n) { _mm256_maskstore_ps(p, lanes(n), x.v); }
static inline void store(bf16* p, vf x) { store16(p, narrow_bf16(x)); }
static inline void store(bf16* p, vf x, int n) { store16(p, narrow_bf16(x), n); }
static inline void store(f16* p, vf x) { store16(p, _mm256_cvtps_ph(x.v, 0)); }
static inline void store(f16* p, vf x, int n) { store16(p, _mm256_cvtps_ph(x.v, 0), n); }

// W/2 floats, each in two neighbouring lanes; or n/2 of them, n even.
static inline __m256 twice(__m128 x) {
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(x),
                                  _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
static inline vf load_twice(const float* p) { return {twice(_mm_loadu_ps(p))}; }
static inline vf load_twice(const float* p, int n) {
  return {twice(_mm_maskload_ps(p, _mm256_castsi256_si128(lanes(n / 2))))};
}
// Each pair of neighbouring lanes exchanged.
static inline vf swap_pairs(vf a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
// a · b - c in even lanes, a · b + c in odd ones.
static inline vf fma_alternating(vf a, vf b, vf c) { return {_mm256_fmaddsub_ps(a.v, b.v, c.v)}; }

// A value that is used many times: keeps GCC from loading it again at each use.
static inline vf keep(vf x) { asm("" : "+x"(x.v)); return x; }

static inline vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float max_of(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf sqrt(vf a) { return {_mm256_sqrt_ps(a.v)}; }
static inline vf round(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline vf scale2(vf a, vf n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)))};
}
// t = whole + part, whole integral and part in [0, 1); t clamped to where scale2 takes the whole:
// 2^128 is infinity to it.
static inline void floor_and_rest(vf t, vf& whole, vf& part) {
  t = min(max(t, set(-126.f)), set(128.f));
  whole = {_mm256_floor_ps(t.v)};
  part = t - whole;
}
// a / b, for what is rounded to a half type.
static inline vf divide_half(vf a, vf b) { return a / b; }

// 16 bf16 as two vectors, the even and the odd ones: a shift and a mask, where loads in order need
// shuffles. `join` puts two such vectors in order, `part` is its inverse.
static inline void split(__m256i x, vf& even, vf& odd) {
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))))};
}
// The same of words that came as floats.
static inline void split(vf words, vf& even, vf& odd) { split(_mm256_castps_si256(words.v), even, odd); }
static inline void load_split(const bf16* p, vf& even, vf& odd) {
  split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), even, odd);
}
static inline void load_split(const bf16* p, vf& even, vf& odd, int n) {
  alignas(32) bf16 buffer[16] = {};
  std::memcpy(buffer, p, size_t(n) * 2);
  load_split(buffer, even, odd);
}
static inline void store_split(bf16* p, vf even, vf odd) {
  const __m256i low = _mm256_srli_epi32(round_bf16(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_blend_epi16(low, round_bf16(odd), 0xaa));
}
static inline void join(vf even, vf odd, vf& first, vf& second) {
  const __m256 lo = _mm256_unpacklo_ps(even.v, odd.v), hi = _mm256_unpackhi_ps(even.v, odd.v);
  first = {_mm256_permute2f128_ps(lo, hi, 0x20)};
  second = {_mm256_permute2f128_ps(lo, hi, 0x31)};
}
static inline void part(vf first, vf second, vf& even, vf& odd) {
  const auto in_order = [](__m256 x) {  // 64-bit elements 0, 2, 1, 3
    return vf{_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8))};
  };
  even = in_order(_mm256_shuffle_ps(first.v, second.v, 0x88));
  odd = in_order(_mm256_shuffle_ps(first.v, second.v, 0xdd));
}

// Rows become columns.
static inline void transpose(vf (&x)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

}  // namespace ISA
}  // namespace llama_fast
