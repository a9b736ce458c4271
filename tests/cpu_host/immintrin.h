// The AVX-512, AMX and AVX-VNNI intrinsics that csrc/cpu uses, in plain C++ and AVX2, after Intel's
// pseudo-code.
//
// With this folder first in the include path, the kernels' sources for the instruction sets avx512,
// avx512_bf16, amx and avx_vnni compile and run on any x86-64 CPU with AVX2, FMA and F16C. Kernels call the
// intrinsics from namespace llama_fast::ISA, so the functions of that namespace, here, hide the
// compiler's own. An intrinsic that is missing here falls through to the compiler's own and fails
// to compile, since its target flag is absent.
//
// test_intrinsics.py compares each one of AVX-512 with the instruction itself, on a CPU that has it. The order
// of terms inside a reduction, which Intel leaves open, is GCC's.
#pragma once
#include_next <immintrin.h>

#ifdef ISA_AVX_VNNI
namespace llama_fast {
namespace ISA {

// Lane i: sum[i] + Σ over its four bytes of a (unsigned) · b (signed), modulo 2^32: the two even
// bytes as words, then the two odd ones.
static inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
// Lane i: sum[i] + both products of its signed words, modulo 2^32.
static inline __m256i _mm256_dpwssd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

}  // namespace ISA
}  // namespace llama_fast
#endif

#if defined(ISA_AVX512) || defined(ISA_AVX512_BF16)

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#undef _mm512_setr_epi32  // the macro of GCC's header; the others are functions when optimising

namespace llama_fast {
namespace ISA {
namespace host {

// Lane i of a vector, seen as lanes of type T.
template <class T, class V> static inline T lane(const V& v, int i) {
  T x;
  std::memcpy(&x, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
  return x;
}
// The vector V whose lane i is f(i), of type T.
template <class V, class T, class F> static inline V each(F f) {
  T lanes[sizeof(V) / sizeof(T)];
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) lanes[i] = f(i);
  V v;
  std::memcpy(&v, lanes, sizeof(V));
  return v;
}
template <class F> static inline __m512 floats(F f) { return each<__m512, float>(f); }
template <class F> static inline __m512i words(F f) { return each<__m512i, int32_t>(f); }
template <class F> static inline __m512i halfwords(F f) { return each<__m512i, int16_t>(f); }

template <class V> static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
// The memory of masked lanes is not touched.
template <class V, class T> static inline V load(uint64_t mask, const void* p) {
  return each<V, T>([&](int i) {
    T x = 0;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
    return x;
  });
}
template <class T, class V> static inline void store(void* p, uint64_t mask, const V& v) {
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) {
    const T x = lane<T>(v, i);
    if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + i * sizeof(T), &x, sizeof(T));
  }
}

static inline float float_of(uint32_t bits) { return lane<float>(bits, 0); }
static inline uint32_t bits_of(float x) { return lane<uint32_t>(x, 0); }

// x · 2^-digits rounded to an integer, times 2^digits; `control` is the immediate of roundscale:
// bits 0 and 1 say how to round, bit 2 to round as MXCSR says (to nearest), bits 4 to 7 are
// `-digits`. Doubles hold every step exactly.
static inline float round_to(float x, int control) {
  if (!std::isfinite(x)) return x;
  const int digits = control >> 4 & 15;
  const double scaled = std::ldexp(double(x), digits);
  double rounded;
  switch (control & 4 ? 0 : control & 3) {
    case 0: rounded = std::nearbyint(scaled); break;
    case 1: rounded = std::floor(scaled); break;
    case 2: rounded = std::ceil(scaled); break;
    default: rounded = std::trunc(scaled);
  }
  return float(std::copysign(std::ldexp(rounded, -digits), double(x)));
}

// Which of less, equal, greater, unordered make the comparison `predicate` true, as bits 0 to 3;
// predicates 16 and up differ in the exceptions that they raise, not in their results.
static inline bool compare(float a, float b, int predicate) {
  static constexpr uint8_t TRUE_WHEN[16] = {2, 1, 3, 8, 13, 14, 12, 7, 10, 9, 11, 0, 5, 6, 4, 15};
  const int outcome = a < b ? 1 : a == b ? 2 : a > b ? 4 : 8;
  return TRUE_WHEN[predicate & 15] & outcome;
}

}  // namespace host

// 512 bits as the same instruction of 256 bits on each half: for what works lane by lane, or
// within 128 bits.
#define HALVES(V, NAME, HALF, NAME_256, PARAMETERS, ...)                                      \
  static inline V NAME PARAMETERS {                                                           \
    return host::each<V, HALF>([&](int h) { return NAME_256(__VA_ARGS__); });                 \
  }
#define HALF_F(x) host::lane<__m256>(x, h)
#define HALF_I(x) host::lane<__m256i>(x, h)
#define FLOATS_2(NAME) HALVES(__m512, _mm512_##NAME, __m256, _mm256_##NAME, (__m512 a, __m512 b), HALF_F(a), HALF_F(b))
#define FLOATS_3(NAME) HALVES(__m512, _mm512_##NAME, __m256, _mm256_##NAME, (__m512 a, __m512 b, __m512 c), HALF_F(a), HALF_F(b), HALF_F(c))
#define INTS_2(NAME, NAME_256) HALVES(__m512i, _mm512_##NAME, __m256i, _mm256_##NAME_256, (__m512i a, __m512i b), HALF_I(a), HALF_I(b))
#define INTS_SHIFT(NAME) HALVES(__m512i, _mm512_##NAME, __m256i, _mm256_##NAME, (__m512i a, unsigned count), HALF_I(a), int(count))

FLOATS_2(add_ps)
FLOATS_2(sub_ps)
FLOATS_2(mul_ps)
FLOATS_2(div_ps)
HALVES(__m512, _mm512_sqrt_ps, __m256, _mm256_sqrt_ps, (__m512 a), HALF_F(a))
FLOATS_2(max_ps)
FLOATS_2(min_ps)
FLOATS_2(unpacklo_ps)
FLOATS_2(unpackhi_ps)
FLOATS_3(fmadd_ps)
FLOATS_3(fmaddsub_ps)
INTS_2(add_epi32, add_epi32)
INTS_2(sub_epi8, sub_epi8)
INTS_2(shuffle_epi8, shuffle_epi8)
INTS_2(mullo_epi32, mullo_epi32)
INTS_2(and_si512, and_si256)
INTS_2(unpacklo_epi16, unpacklo_epi16)
INTS_2(unpackhi_epi16, unpackhi_epi16)
INTS_SHIFT(slli_epi32)
INTS_SHIFT(srli_epi32)
INTS_SHIFT(srli_epi16)

#undef HALVES
#undef HALF_F
#undef HALF_I
#undef FLOATS_2
#undef FLOATS_3
#undef INTS_2
#undef INTS_SHIFT

// Constants and casts.
static inline __m512 _mm512_set1_ps(float x) { return host::floats([&](int) { return x; }); }
static inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.f); }
static inline __m512i _mm512_set1_epi32(int x) { return host::words([&](int) { return x; }); }
static inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  int32_t x[4];
  std::memcpy(x, &a, sizeof(x));
  return host::words([&](int i) { return x[i % 4]; });
}
static inline __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h,
                                        int i, int j, int k, int l, int m, int n, int o, int p) {
  const int x[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return host::load<__m512i>(x);
}
static inline __m512 _mm512_castsi512_ps(__m512i a) { return __m512(a); }
static inline __m512i _mm512_castps_si512(__m512 a) { return __m512i(a); }
// The upper half is undefined: here NaN.
static inline __m512 _mm512_castps256_ps512(__m256 a) {
  return host::floats([&](int i) { return i < 8 ? a[i] : host::float_of(0x7fc00000); });
}

// Memory.
static inline __m512 _mm512_loadu_ps(const void* p) { return host::load<__m512>(p); }
static inline __m512i _mm512_loadu_si512(const void* p) { return host::load<__m512i>(p); }
static inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) {
  return host::load<__m512, float>(k, p);
}
static inline __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void* p) {
  return host::load<__m512i, int16_t>(k, p);
}
static inline __m256 _mm256_maskz_loadu_ps(__mmask8 k, const void* p) {
  return host::load<__m256, float>(k, p);
}
static inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
  return host::load<__m256i, int16_t>(k, p);
}
static inline __m256i _mm256_maskz_loadu_epi8(__mmask32 k, const void* p) {
  return host::load<__m256i, int8_t>(k, p);
}
static inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
static inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }
static inline void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 a) {
  host::store<float>(p, k, a);
}
static inline void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i a) {
  host::store<int16_t>(p, k, a);
}

// Selection by mask.
static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  __mmask16 k = 0;
  for (int i = 0; i < 16; ++i) k |= __mmask16(host::compare(a[i], b[i], predicate) << i);
  return k;
}
static inline __m512i _mm512_mask_mov_epi32(__m512i src, __mmask16 k, __m512i a) {
  return host::words([&](int i) { return host::lane<int32_t>(k >> i & 1 ? a : src, i); });
}
static inline __m512i _mm512_mask_set1_epi32(__m512i src, __mmask16 k, int x) {
  return _mm512_mask_mov_epi32(src, k, _mm512_set1_epi32(x));
}
static inline __m512i _mm512_mask_blend_epi16(__mmask32 k, __m512i a, __m512i b) {
  return host::halfwords([&](int i) { return host::lane<int16_t>(k >> i & 1 ? b : a, i); });
}

// Permutations.
static inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
  return host::floats([&](int i) { return a[host::lane<int32_t>(index, i) & 15]; });
}
static inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return host::floats([&](int i) {
    const int32_t from = host::lane<int32_t>(index, i);
    return from & 16 ? b[from & 15] : a[from & 15];
  });
}
static inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  return host::halfwords([&](int i) {
    return host::lane<int16_t>(a, host::lane<int16_t>(index, i) & 31);
  });
}
// Two bits of `from` for each lane i of four.
static inline __m512 _mm512_permute_ps(__m512 a, int from) {
  return host::floats([&](int i) { return a[i / 4 * 4 + (from >> i % 4 * 2 & 3)]; });
}
static inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int from) {
  return host::floats([&](int i) {
    return (i % 4 < 2 ? a : b)[i / 4 * 4 + (from >> i % 4 * 2 & 3)];
  });
}
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int from) {
  return host::floats([&](int i) {
    return (i < 8 ? a : b)[(from >> i / 4 * 2 & 3) * 4 + i % 4];
  });
}

// Conversions.
static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return host::words([&](int i) { return host::lane<uint16_t>(a, i); });
}
static inline __m512i _mm512_cvtepi8_epi16(__m256i a) {
  return host::halfwords([&](int i) { return host::lane<int8_t>(a, i); });
}
static inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return host::each<__m256i, int16_t>([&](int i) { return int16_t(host::lane<int32_t>(a, i)); });
}
static inline __m512 _mm512_cvtph_ps(__m256i a) {
  return host::each<__m512, __m256>([&](int h) { return _mm256_cvtph_ps(host::lane<__m128i>(a, h)); });
}
// Modulo 2^8.
static inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return host::each<__m128i, int8_t>([&](int i) { return int8_t(host::lane<int32_t>(a, i)); });
}
static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return host::each<__m512, __m256>([&](int h) {
    return _mm256_cvtepi32_ps(host::lane<__m256i>(a, h));
  });
}
static inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return host::each<__m512i, __m256i>([&](int h) {
    return _mm256_cvtps_epi32(host::lane<__m256>(a, h));
  });
}
// Rounds to nearest: `rounding` is 0 wherever it is used.
static inline __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  return host::each<__m256i, __m128i>([&](int h) {
    return _mm256_cvtps_ph(host::lane<__m256>(a, h), _MM_FROUND_TO_NEAREST_INT);
  });
}

// Arithmetic of AVX-512 alone.
static inline __m512 _mm512_roundscale_ps(__m512 a, int control) {
  return host::floats([&](int i) { return host::round_to(a[i], control); });
}
// a - roundscale(a). The difference is rounded in the direction that `control` names as well, and
// a zero is negative when that is downwards.
static inline __m512 _mm512_reduce_ps(__m512 a, int control) {
  return host::floats([&](int i) {
    const float x = a[i];
    if (x != x) return x;
    if (std::isinf(x)) return 0.f;
    const float whole = host::round_to(x, control), part = x - whole;
    const int direction = control & 4 ? 0 : control & 3;
    if (part == 0) return direction == 1 ? -0.f : 0.f;
    // x - whole = part + error, exactly.
    const float back = part - x, error = (x - (part - back)) - (whole + back);
    const float infinity = std::numeric_limits<float>::infinity();
    if (error < 0 && (direction == 1 || (direction == 3 && part > 0)))
      return std::nextafterf(part, -infinity);
    if (error > 0 && (direction == 2 || (direction == 3 && part < 0)))
      return std::nextafterf(part, infinity);
    return part;
  });
}
// a · 2^floor(n), rounded once, subnormal results kept. An infinite n turns even a quiet NaN a into
// infinity or zero.
static inline __m512 _mm512_scalef_ps(__m512 a, __m512 n) {
  return host::floats([&](int i) {
    const float x = a[i], e = n[i], nan = std::numeric_limits<float>::quiet_NaN();
    const bool signals = x != x && !(host::bits_of(x) & 0x400000);
    if (e != e || signals) return nan;
    if (std::isinf(e)) {
      if (x != x) return e > 0 ? e : 0.f;
      if (e > 0) return x == 0 ? nan : std::copysign(e, x);
      return std::isinf(x) ? nan : std::copysign(0.f, x);
    }
    return std::ldexp(x, int(std::floor(std::fmin(std::fmax(e, -1000.f), 1000.f))));
  });
}
// 1 / a with a relative error below 2^-14: here as coarse as that, cut off after 14 bits, so
// results differ from a CPU's in the last of them.
static inline __m512 _mm512_rcp14_ps(__m512 a) {
  return host::floats([&](int i) {
    const float r = 1.f / a[i];
    return std::isnormal(r) ? host::float_of(host::bits_of(r) & 0xfffffe00) : r;
  });
}

// Lane i: sum[i] + Σ over its four bytes of a (unsigned) · b (signed), modulo 2^32.
static inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  return host::words([&](int i) {
    uint32_t total = host::lane<uint32_t>(sum, i);
    for (int j = 4 * i; j < 4 * i + 4; ++j)
      total += uint32_t(host::lane<uint8_t>(a, j) * host::lane<int8_t>(b, j));
    return int32_t(total);
  });
}

// Lane i: sum[i] + both products of its signed words, modulo 2^32.
static inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  return host::words([&](int i) {
    uint32_t total = host::lane<uint32_t>(sum, i);
    for (int j = 2 * i; j < 2 * i + 2; ++j)
      total += uint32_t(host::lane<int16_t>(a, j) * host::lane<int16_t>(b, j));
    return int32_t(total);
  });
}

// Reductions, upper half onto lower half.
static inline float _mm512_reduce_add_ps(__m512 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
static inline float _mm512_reduce_max_ps(__m512 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}

#ifdef ISA_AVX512_BF16
namespace host {

// vcvtneps2bf16 of one float: to nearest, ties to even; a subnormal becomes a zero of its sign
// whatever MXCSR says; a NaN stays a NaN and becomes quiet.
static inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return uint16_t(u >> 16 | 0x40);
  if (std::fabs(x) < FLT_MIN) return uint16_t(u >> 16 & 0x8000);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }
static inline float from_bf16(uint16_t x) { return flushed(float_of(uint32_t(x) << 16)); }

}  // namespace host

static inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return host::each<__m256bh, uint16_t>([&](int i) { return host::to_bf16(a[i]); });
}
// a in the upper half of the result.
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  return host::each<__m512bh, uint16_t>([&](int i) {
    return host::to_bf16(i < 16 ? b[i] : a[i - 16]);
  });
}

// Lane i: sum[i] + a[2i+1]·b[2i+1], then + a[2i]·b[2i]: two fused multiply-adds, the odd product
// first, each rounded to nearest even to a float. Whatever MXCSR says, subnormal numbers count as
// zeros of their sign where they come in (sum, a, b) and between and after the two steps.
static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return host::floats([&](int i) {
    float total = host::flushed(sum[i]);
    for (int j = 2 * i + 1; j >= 2 * i; --j) {
      const float x = host::from_bf16(host::lane<uint16_t>(a, j));
      const float y = host::from_bf16(host::lane<uint16_t>(b, j));
      total = host::flushed(std::fma(x, y, total));
    }
    return total;
  });
}
#endif

#ifdef ISA_AMX
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud

namespace host {

struct Tile { uint8_t row[16][64]; };
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};
static thread_local Tile tiles[8];  // zero beyond what is configured
static thread_local TileConfig config;

template <class T> static inline T element(const Tile& tile, int row, int i) {
  T x;
  std::memcpy(&x, tile.row[row] + i * sizeof(T), sizeof(T));
  return x;
}

// Row m, word n of `to` += Σ over its four bytes of a[m] times those of word n of b's row, in turn.
template <class A, class B> static inline void dot_bytes(int to, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      uint32_t total = element<uint32_t>(tiles[to], m, n);
      for (int k = 0; k < 64; ++k)
        total += uint32_t(int32_t(element<A>(tiles[a], m, k)) *
                          int32_t(element<B>(tiles[b], k / 4, n * 4 + k % 4)));
      std::memcpy(tiles[to].row[m] + n * 4, &total, 4);
    }
}

}  // namespace host

static inline void _tile_loadconfig(const void* p) {
  std::memcpy(&host::config, p, sizeof(host::config));
}
static inline void _tile_release() { host::config = {}; }
static inline void _tile_zero(int to) { host::tiles[to] = {}; }
static inline void _tile_loadd(int to, const void* p, int64_t stride) {
  using namespace host;
  _tile_zero(to);
  for (int m = 0; m < config.rows[to]; ++m)
    std::memcpy(tiles[to].row[m], static_cast<const char*>(p) + m * stride, config.bytes[to]);
}
static inline void _tile_stored(int from, void* p, int64_t stride) {
  using namespace host;
  for (int m = 0; m < config.rows[from]; ++m)
    std::memcpy(static_cast<char*>(p) + m * stride, tiles[from].row[m], config.bytes[from]);
}
// Row m, word n of `to`: over the rows k of b, the even products of a[m] and b[k] by themselves, and the
// odd ones, each a fused multiply-add; both together; then to what was there. Subnormal numbers count
// as zeros of their sign, as in _mm512_dpbf16_ps.
static inline void _tile_dpbf16ps(int to, int a, int b) {
  using namespace host;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {0.f, 0.f};
      for (int k = 0; k < 32; ++k) {
        const float x = from_bf16(element<uint16_t>(tiles[a], m, k));
        const float y = from_bf16(element<uint16_t>(tiles[b], k / 2, 2 * n + k % 2));
        sums[k % 2] = flushed(std::fma(x, y, sums[k % 2]));
      }
      const float total =
          flushed(flushed(element<float>(tiles[to], m, n)) + flushed(sums[0] + sums[1]));
      std::memcpy(tiles[to].row[m] + n * 4, &total, 4);
    }
}
static inline void _tile_dpbssd(int to, int a, int b) { host::dot_bytes<int8_t, int8_t>(to, a, b); }
static inline void _tile_dpbsud(int to, int a, int b) { host::dot_bytes<int8_t, uint8_t>(to, a, b); }
static inline void _tile_dpbusd(int to, int a, int b) { host::dot_bytes<uint8_t, int8_t>(to, a, b); }
static inline void _tile_dpbuud(int to, int a, int b) { host::dot_bytes<uint8_t, uint8_t>(to, a, b); }
#endif

}  // namespace ISA
}  // namespace llama_fast

#endif
