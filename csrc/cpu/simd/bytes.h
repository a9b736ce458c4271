// Vectors with four bytes in each 32-bit lane, and their sums of products, for quantised weights.
//
// A quantised weight is an unsigned byte, an activation a signed one in -127 … 127. `dot` adds to lane
// i of `acc` the four products of lane i. Not every instruction set can take weights above 127 as they
// are: what they are reduced by before they are multiplied is the BIAS of their kind.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace llama_fast {
namespace ISA {

// What a quantised weight may be: a byte below 128, as what nibbles stand for is, or any byte.
struct SmallByte {};
struct Byte {};

static inline uint32_t word_at(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

#if defined(ISA_AVX512) || defined(ISA_AVX512_BF16)

struct vi { __m512i v; };
using Table = vi;

static inline vi load_lanes(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_lanes(void* p, vi x) { _mm512_storeu_si512(p, x.v); }
static inline vi set(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline vf to_float(vi x) { return {_mm512_cvtepi32_ps(x.v)}; }
static inline vi low_nibbles(vi x) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi32(0x0f0f0f0f))};
}
static inline vi high_nibbles(vi x) { return low_nibbles({_mm512_srli_epi16(x.v, 4)}); }
// What a table of 16 bytes has for each nibble.
static inline vi table_of(const void* bytes) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(bytes)))};
}
static inline vi look_up(vi table, vi nibbles) { return {_mm512_shuffle_epi8(table.v, nibbles.v)}; }
// Byte j of each lane, as a number.
template <int J> static inline vi byte_of(vi x) {
  return {_mm512_and_si512(_mm512_srli_epi32(x.v, 8 * J), _mm512_set1_epi32(0xff))};
}
// Integral floats in -127 … 127 as signed bytes.
static inline void store_bytes(int8_t* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

template <class Kind> static constexpr int BIAS = 0;
template <class Kind> static inline vi dot(Kind, vi qdata, vi x, vi acc) {
#ifdef __AVX512VNNI__  // the tests compile this for CPUs without it too
  // GCC 12 copies the accumulator of the intrinsic twice in each step of a loop.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(qdata.v), "v"(x.v));
  return acc;
#else
  return {_mm512_dpbusd_epi32(acc.v, qdata.v, x.v)};
#endif
}

#elif defined(ISA_AVX2)

struct vi { __m256i v; };
using Table = vi;

static inline vi load_lanes(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
static inline void store_lanes(void* p, vi x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.v);
}
static inline vi set(int32_t x) { return {_mm256_set1_epi32(x)}; }
static inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.v)}; }
static inline vi low_nibbles(vi x) {
  return {_mm256_and_si256(x.v, _mm256_set1_epi32(0x0f0f0f0f))};
}
static inline vi high_nibbles(vi x) { return low_nibbles({_mm256_srli_epi16(x.v, 4)}); }
static inline vi table_of(const void* bytes) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(bytes)))};
}
static inline vi look_up(vi table, vi nibbles) { return {_mm256_shuffle_epi8(table.v, nibbles.v)}; }
template <int J> static inline vi byte_of(vi x) {
  return {_mm256_and_si256(_mm256_srli_epi32(x.v, 8 * J), _mm256_set1_epi32(0xff))};
}
static inline void store_bytes(int8_t* p, vf x) {
  const __m256i words = _mm256_cvtps_epi32(x.v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}

template <class Kind> static constexpr int BIAS = 0;

#ifdef ISA_AVX_VNNI

template <class Kind> static inline vi dot(Kind, vi qdata, vi x, vi acc) {
#ifdef __AVXVNNI__  // as above
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.v) : "x"(qdata.v), "x"(x.v));
  return acc;
#else
  return {_mm256_dpbusd_avx_epi32(acc.v, qdata.v, x.v)};
#endif
}

#else

// vpmaddubsw adds two products in 16 bits and saturates: 2 · 127 · 127 fits, 2 · 255 · 127 does not.
// A byte is therefore made signed, and its sign moved to the activation: 2 · 128 · 127 fits.
template <> constexpr int BIAS<Byte> = 128;

static inline __m256i add_pairs(__m256i pairs, __m256i acc) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline vi dot(SmallByte, vi qdata, vi x, vi acc) {
  return {add_pairs(_mm256_maddubs_epi16(qdata.v, x.v), acc.v)};
}
static inline vi dot(Byte, vi qdata, vi x, vi acc) {
  const __m256i q = _mm256_xor_si256(qdata.v, _mm256_set1_epi8(-128));
  return {add_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x.v, q)), acc.v)};
}

#endif

#else

struct vi { int32_t v; };
struct Table { const uint8_t* bytes; };

static inline vi load_lanes(const void* p) { return {int32_t(word_at(p))}; }
static inline void store_lanes(void* p, vi x) { std::memcpy(p, &x.v, sizeof(x.v)); }
static inline vi set(int32_t x) { return {x}; }
static inline vf to_float(vi x) { return {float(x.v)}; }
static inline vi low_nibbles(vi x) { return {x.v & 0x0f0f0f0f}; }
static inline vi high_nibbles(vi x) { return {int32_t(uint32_t(x.v) >> 4 & 0x0f0f0f0fu)}; }
static inline Table table_of(const void* bytes) { return {static_cast<const uint8_t*>(bytes)}; }
static inline vi look_up(Table table, vi nibbles) {
  uint32_t found = 0;
  for (int shift = 0; shift < 32; shift += 8)
    found |= uint32_t(table.bytes[uint32_t(nibbles.v) >> shift & 15]) << shift;
  return {int32_t(found)};
}
template <int J> static inline vi byte_of(vi x) { return {int32_t(uint32_t(x.v) >> (8 * J) & 0xff)}; }
static inline void store_bytes(int8_t* p, vf x) { *p = int8_t(x.v); }

template <class Kind> static constexpr int BIAS = 0;
template <class Kind> static inline vi dot(Kind, vi qdata, vi x, vi acc) {
  uint8_t c[4];
  int8_t a[4];
  std::memcpy(c, &qdata.v, 4);
  std::memcpy(a, &x.v, 4);
  for (int j = 0; j < 4; ++j) acc.v += int32_t(c[j]) * a[j];
  return acc;
}

#endif

// The same four bytes in every lane.
static inline vi set_bytes(const void* p) { return set(int32_t(word_at(p))); }

}  // namespace ISA
}  // namespace llama_fast
