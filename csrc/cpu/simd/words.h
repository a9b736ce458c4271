// Vectors with two signed 16-bit words in each 32-bit lane, for products of bytes with numbers
// that need more than 8 bits. `dot_words` adds to lane i of `acc` both products of lane i.
#pragma once

#include "bytes.h"

namespace llama_fast {
namespace ISA {

// What a word's sums leave room for: 2 · 32767 · 127 in a lane, some 250 times.
constexpr float WORD_MAX = 32767.f;

#if defined(ISA_AVX512) || defined(ISA_AVX512_BF16)

// The same 32 bits in each lane.
static inline vf as_floats(vi x) { return {_mm512_castsi512_ps(x.v)}; }
static inline vi as_lanes(vf x) { return {_mm512_castps_si512(x.v)}; }

// 2W bytes as words, in memory's order; or the first n of them and zeros.
static inline vi load_words(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline vi load_words(const int8_t* p, int n) {
  return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << n) - 1), p))};
}
// 2W bytes of each of two rows as pairs of words, one of each row. What is summed from them lies in
// an order that `order_columns` turns into memory's.
static inline void pair_words(__m256i row0, __m256i row1, vi& a, vi& b) {
  a = {_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(row0, row1))};
  b = {_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(row0, row1))};
}
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b) {
  pair_words(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)),
             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)), a, b);
}
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b, int n) {
  const __mmask32 mask = __mmask32((uint64_t(1) << n) - 1);
  pair_words(_mm256_maskz_loadu_epi8(mask, row0), _mm256_maskz_loadu_epi8(mask, row1), a, b);
}
static inline void order_columns(vf a, vf b, vf& first, vf& second) {
  first = {_mm512_shuffle_f32x4(a.v, b.v, 0x44)};
  second = {_mm512_shuffle_f32x4(a.v, b.v, 0xee)};
}
static inline vi dot_words(vi a, vi b, vi acc) {
#ifdef __AVX512VNNI__  // the tests compile this for CPUs without it too
  // GCC 12 copies the accumulator of the intrinsic twice in each step of a loop.
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
#else
  return {_mm512_dpwssd_epi32(acc.v, a.v, b.v)};
#endif
}
// The same of floats' bits: GCC 12 moves sums that change their type in each step out of the registers.
static inline vf dot_words(vf a, vf b, vf acc) {
#ifdef __AVX512VNNI__
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
#else
  return as_floats(dot_words(as_lanes(a), as_lanes(b), as_lanes(acc)));
#endif
}
// Lane i is the sum of x[i]. A blend and a shuffle bring two halves together where two
// shuffles would do, of which a cycle has one.
static inline __m512i fold(__m512i blended, __m512 shuffled) {
  return _mm512_add_epi32(blended, _mm512_castps_si512(shuffled));
}
static inline vf sums(const vi (&x)[16]) {
  const auto f = [](__m512i a) { return _mm512_castsi512_ps(a); };
  __m512i a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512i p = x[2 * i].v, q = x[2 * i + 1].v;
    a[i] = fold(_mm512_mask_mov_epi32(p, 0xcccc, q), _mm512_shuffle_ps(f(p), f(q), 0x4e));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 p = f(a[2 * i]), q = f(a[2 * i + 1]);
    b[i] = fold(_mm512_castps_si512(_mm512_shuffle_ps(p, q, 0x88)), _mm512_shuffle_ps(p, q, 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512i p = b[2 * i], q = b[2 * i + 1];
    c[i] = fold(_mm512_mask_mov_epi32(p, 0xff00, q), _mm512_shuffle_f32x4(f(p), f(q), 0x4e));
  }
  const __m512 p = f(c[0]), q = f(c[1]);
  return to_float(vi{fold(_mm512_castps_si512(_mm512_shuffle_f32x4(p, q, 0x88)),
                          _mm512_shuffle_f32x4(p, q, 0xdd))});
}
// Integral floats in -32767 … 32767 as words.
static inline void store_words(int16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

#elif defined(ISA_AVX2)

static inline vf as_floats(vi x) { return {_mm256_castsi256_ps(x.v)}; }
static inline vi as_lanes(vf x) { return {_mm256_castps_si256(x.v)}; }
static inline __m128i load_codes(const int8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
static inline __m128i load_codes(const int8_t* p, int n) {
  alignas(16) int8_t buffer[16] = {};
  std::memcpy(buffer, p, size_t(n));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
static inline vi load_words(const int8_t* p) { return {_mm256_cvtepi8_epi16(load_codes(p))}; }
static inline vi load_words(const int8_t* p, int n) {
  return {_mm256_cvtepi8_epi16(load_codes(p, n))};
}
static inline void pair_words(__m128i row0, __m128i row1, vi& a, vi& b) {
  a = {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(row0, row1))};
  b = {_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(row0, row1))};
}
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b) {
  pair_words(load_codes(row0), load_codes(row1), a, b);
}
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b, int n) {
  pair_words(load_codes(row0, n), load_codes(row1, n), a, b);
}
static inline void order_columns(vf a, vf b, vf& first, vf& second) {
  first = a;
  second = b;
}
static inline vi dot_words(vi a, vi b, vi acc) {
#if !defined(ISA_AVX_VNNI)
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(a.v, b.v))};
#elif defined(__AVXVNNI__)  // as above
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc.v) : "x"(a.v), "x"(b.v));
  return acc;
#else
  return {_mm256_dpwssd_avx_epi32(acc.v, a.v, b.v)};
#endif
}
static inline vf dot_words(vf a, vf b, vf acc) {
#if defined(ISA_AVX_VNNI) && defined(__AVXVNNI__)
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc.v) : "x"(a.v), "x"(b.v));
  return acc;
#else
  return as_floats(dot_words(as_lanes(a), as_lanes(b), as_lanes(acc)));
#endif
}
// Lane i is the sum of x[i], as exact as a float has it.
static inline vf sums(const vi (&x)[8]) {
  const auto four = [&](int i) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(x[i].v, x[i + 1].v),
                             _mm256_hadd_epi32(x[i + 2].v, x[i + 3].v));
  };
  const __m256i a = four(0), b = four(4);
  return to_float(vi{_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                      _mm256_permute2x128_si256(a, b, 0x31))});
}
static inline void store_words(int16_t* p, vf x) {
  const __m256i words = _mm256_cvtps_epi32(x.v);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#else

static inline vf as_floats(vi x) { return {float_of(uint32_t(x.v))}; }
static inline vi as_lanes(vf x) { return {int32_t(bits_of(x.v))}; }
// The lower word of a lane in its lower half.
static inline vi lane_of(int32_t low, int32_t high) {
  return {int32_t(uint32_t(high) << 16 | (uint32_t(low) & 0xffff))};
}
static inline vi load_words(const int8_t* p) { return lane_of(p[0], p[1]); }
static inline vi load_words(const int8_t* p, int n) { return lane_of(p[0], n > 1 ? p[1] : 0); }
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b) {
  a = lane_of(row0[0], row1[0]);
  b = lane_of(row0[1], row1[1]);
}
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b, int n) {
  a = lane_of(row0[0], row1[0]);
  b = n > 1 ? lane_of(row0[1], row1[1]) : vi{0};
}
static inline void order_columns(vf a, vf b, vf& first, vf& second) {
  first = a;
  second = b;
}
static inline vi dot_words(vi a, vi b, vi acc) {
  return {acc.v + int16_t(a.v) * int16_t(b.v) + (a.v >> 16) * (b.v >> 16)};
}
static inline vf dot_words(vf a, vf b, vf acc) {
  return as_floats(dot_words(as_lanes(a), as_lanes(b), as_lanes(acc)));
}
static inline vf sums(const vi (&x)[1]) { return to_float(x[0]); }
static inline void store_words(int16_t* p, vf x) { *p = int16_t(x.v); }

#endif

// The same two words in every lane.
static inline vi set_words(const int16_t* p) { return set_bytes(p); }
// With a width, as for_each_vector gives one.
static inline vi load_words(const int8_t* p, Full) { return load_words(p); }
static inline void load_columns(const int8_t* row0, const int8_t* row1, vi& a, vi& b, Full) {
  load_columns(row0, row1, a, b);
}

}  // namespace ISA
}  // namespace llama_fast
