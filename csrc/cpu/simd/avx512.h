// Sixteen floats: AVX-512 F, BW, VL, DQ; with AVX512_BF16 the conversions to bf16 are instructions.
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

static inline vf widen_bf16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
static inline __m256i narrow_bf16(vf x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

static inline vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline vf load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
static inline vf load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
static inline vf load(const bf16* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lanes(n), p));
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

static inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
static inline float max_of(vf a) { return _mm512_reduce_max_ps(a.v); }
static inline vf round(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline vf scale2(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }

}  // namespace ISA
}  // namespace llama_fast
