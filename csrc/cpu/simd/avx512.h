// Sixteen floats: AVX-512 F, BW, VL, DQ, VNNI; with AVX512_BF16 the conversions to bf16 are instructions.
#pragma once

#include <immintrin.h>

#include "half.h"

namespace llama_fast {
namespace ISA {

struct vf {
  static constexpr int W = 16;
  __m512 v;
};

static inline vf set(float x) { return {_mm512_set1_ps(x)}; }
static inline vf zero() { return {_mm512_setzero_ps()}; }

static inline __mmask16 lanes(int n) { return __mmask16((1u << n) - 1); }

static inline vf from_bf16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
#ifndef ISA_AVX512_BF16
// Rounds to bf16 in the upper half of each lane; what the lower half holds is of no use.
static inline __m512i round_bf16(vf x) {
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // A NaN, which the sum may have carried into a number, becomes the NaN of all ones.
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_set1_epi32(r, nan, -1);
}
#endif
static inline __m256i narrow_bf16(vf x) {
#ifdef ISA_AVX512_BF16
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16));
#endif
}

static inline vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline vf load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
static inline vf load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
static inline vf load(const bf16* p, int n) {
  return from_bf16(_mm256_maskz_loadu_epi16(lanes(n), p));
}
static inline vf load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
static inline vf load(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))};
}

static inline void store(float* p, vf x) { _mm512_storeu_ps(p, x.v); }
static inline void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, lanes(n), x.v); }
static inline void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(x)); }
static inline void store(bf16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), narrow_bf16(x));
}
static inline void store(f16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, 0));
}
static inline void store(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtps_ph(x.v, 0));
}

// W/2 floats, each in two neighbouring lanes; or n/2 of them, n even.
static inline __m512 twice(__m256 x) {
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), _mm512_castps256_ps512(x));
}
static inline vf load_twice(const float* p) { return {twice(_mm256_loadu_ps(p))}; }
static inline vf load_twice(const float* p, int n) {
  return {twice(_mm256_maskz_loadu_ps(__mmask8(lanes(n / 2)), p))};
}
// Each pair of neighbouring lanes exchanged.
static inline vf swap_pairs(vf a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
// a · b - c in even lanes, a · b + c in odd ones.
static inline vf fma_alternating(vf a, vf b, vf c) { return {_mm512_fmaddsub_ps(a.v, b.v, c.v)}; }

// A value that is used many times: keeps GCC from loading it again at each use.
static inline vf keep(vf x) {
#ifdef __AVX512F__  // the tests compile this for CPUs without such registers too
  asm("" : "+v"(x.v));
#endif
  return x;
}

static inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
static inline float max_of(vf a) { return _mm512_reduce_max_ps(a.v); }
static inline vf sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
static inline vf round(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline vf scale2(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// t = whole + part, part in [0, 1), for scale2, which takes the floor of the whole itself.
static inline void floor_and_rest(vf t, vf& whole, vf& part) {
  whole = t;
  part = {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// a / b within 2^-13, for what is rounded to a half type; 0 where b is infinite.
static inline vf divide_half(vf a, vf b) { return {_mm512_mul_ps(a.v, _mm512_rcp14_ps(b.v))}; }

// 32 bf16 as two vectors, the even and the odd ones: a shift and a mask, where loads in order need
// shuffles. `join` puts two such vectors in order, `part` is its inverse.
static inline void split(__m512i x, vf& even, vf& odd) {
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))))};
}
// The first n of 32 half-words, n ≤ 32.
static inline __m512i load16(const void* p, int n) {
  return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
}
// The same of words that came as floats.
static inline void split(vf words, vf& even, vf& odd) { split(_mm512_castps_si512(words.v), even, odd); }
static inline void load_split(const bf16* p, vf& even, vf& odd) {
  split(_mm512_loadu_si512(p), even, odd);
}
static inline void load_split(const bf16* p, vf& even, vf& odd, int n) {
  split(load16(p, n), even, odd);
}
static inline void store_split(bf16* p, vf even, vf odd) {
#ifdef ISA_AVX512_BF16
  const __m512i evens_odds = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
  const __m512i interleave = _mm512_add_epi32(  // 0, 16, 1, 17, …
      _mm512_set1_epi32(0x00100000),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(interleave, evens_odds));
#else
  const __m512i low = _mm512_srli_epi32(round_bf16(even), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, low, round_bf16(odd)));
#endif
}
static inline void join(vf even, vf odd, vf& first, vf& second) {
  const __m512i lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i hi = _mm512_add_epi32(lo, _mm512_set1_epi32(8));
  first = {_mm512_permutex2var_ps(even.v, lo, odd.v)};
  second = {_mm512_permutex2var_ps(even.v, hi, odd.v)};
}
static inline void part(vf first, vf second, vf& even, vf& odd) {
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  even = {_mm512_permutex2var_ps(first.v, evens, second.v)};
  odd = {_mm512_permutex2var_ps(first.v, odds, second.v)};
}

// Rows become columns.
static inline void transpose(vf (&x)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: column j of each 128-bit lane, of rows i … i + 3
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 top_even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);  // lanes 0, 2 of both
    const __m512 top_odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 low_even = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    x[j].v = _mm512_shuffle_f32x4(top_even, low_even, 0x88);
    x[4 + j].v = _mm512_shuffle_f32x4(top_odd, low_odd, 0x88);
    x[8 + j].v = _mm512_shuffle_f32x4(top_even, low_even, 0xdd);
    x[12 + j].v = _mm512_shuffle_f32x4(top_odd, low_odd, 0xdd);
  }
}

#ifdef ISA_AVX512_BF16
// Pairs of bf16 in the lanes of a vf, and the instruction that multiplies them: each lane of the
// accumulator gains two products.
#define ISA_HAS_PAIRS 1
static inline vf bits(__m512i x) { return {_mm512_castsi512_ps(x)}; }
static inline __m512i bits(vf x) { return _mm512_castps_si512(x.v); }
static inline vf load_pairs(const bf16* p) { return bits(_mm512_loadu_si512(p)); }
static inline vf load_pairs(const bf16* p, int n) { return bits(load16(p, n)); }
static inline vf dot_pairs(vf a, vf b, vf c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)bits(a), (__m512bh)bits(b))};
}
// What was converted from bf16, as pairs again: lane i holds first[i] and second[i].
static inline vf pair_up(vf first, vf second) {
  return bits(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bits(first), 16), bits(second)));
}
// Pairs whose second element is zero.
static inline vf first_of_pairs(vf x) {
  return bits(_mm512_and_si512(bits(x), _mm512_set1_epi32(0xffff)));
}
// Two rows of 32 bf16 → 32 pairs (one of each row) in two vectors, in an order that `in_order`
// puts right, for these pairs or for what was accumulated from them.
static inline void pair_rows(vf row0, vf row1, vf& a, vf& b) {
  a = bits(_mm512_unpacklo_epi16(bits(row0), bits(row1)));
  b = bits(_mm512_unpackhi_epi16(bits(row0), bits(row1)));
}
static inline void in_order(vf a, vf b, vf& first, vf& second) {
  const __m512i lo = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i hi = _mm512_add_epi32(lo, _mm512_set1_epi32(8));
  first = {_mm512_permutex2var_ps(a.v, lo, b.v)};
  second = {_mm512_permutex2var_ps(a.v, hi, b.v)};
}
#endif

}  // namespace ISA
}  // namespace llama_fast
