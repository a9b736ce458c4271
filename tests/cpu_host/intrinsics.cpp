// What each AVX-512 intrinsic of the kernels returns for fixed inputs: compiled with the
// instructions themselves and with the definitions beside this file, it must print the same.
//
// First come values worked out by hand, for the intrinsics with the most rules: a wrong one makes
// the program return 1. Then a line for each intrinsic: its name and a hash of its results over
// many inputs, in which every NaN counts alike.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>

namespace llama_fast {
namespace ISA {

template <class To, class From> static To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "one size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
static float first(__m512 a) {
  float x[16];
  std::memcpy(x, &a, sizeof(x));
  return x[0];
}

// ---- values worked out by hand ----

static bool wrong = false;

static void expect(const char* what, float actual, float expected) {
  if (as<uint32_t>(actual) == as<uint32_t>(expected)) return;
  if (actual != actual && expected != expected) return;
  std::printf("%s: %a instead of %a\n", what, double(actual), double(expected));
  wrong = true;
}
static void expect_bits(const char* what, uint32_t actual, uint32_t expected) {
  if (actual == expected) return;
  std::printf("%s: %x instead of %x\n", what, actual, expected);
  wrong = true;
}

static const float INF = std::numeric_limits<float>::infinity();
static const float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

static float scalef(float a, float n) {
  return first(_mm512_scalef_ps(_mm512_set1_ps(a), _mm512_set1_ps(n)));
}
static void expect_scalef() {
  expect("scalef takes the floor", scalef(3, 1.75f), 6);
  expect("scalef takes the floor below zero", scalef(3, -0.5f), 1.5f);
  expect("scalef keeps subnormals", scalef(1, -149), 0x1p-149f);
  expect("scalef rounds once", scalef(0x1.8p0f, -149), 0x1p-148f);
  expect("scalef overflows", scalef(-1, 128), -INF);
  expect("scalef reaches from end to end", scalef(0x1p-149f, 276), 0x1p127f);
  expect("scalef by -infinity", scalef(-5, -INF), -0.f);
  expect("scalef by infinity", scalef(-5, INF), -INF);
  expect("scalef of zero by infinity", scalef(0, INF), NOT_A_NUMBER);
  expect("scalef of infinity by -infinity", scalef(INF, -INF), NOT_A_NUMBER);
  expect("scalef by NaN", scalef(1, NOT_A_NUMBER), NOT_A_NUMBER);
}

static uint32_t to_f16(float x) {
  return as<uint32_t>(as<__m256>(_mm512_cvtps_ph(_mm512_set1_ps(x), 0))[0]) & 0xffff;
}
static float from_f16(uint16_t x) { return first(_mm512_cvtph_ps(_mm256_set1_epi16(short(x)))); }
static void expect_f16() {
  expect_bits("65519.996 to f16", to_f16(65519.996f), 0x7bff);
  expect_bits("65520 to f16", to_f16(65520), 0x7c00);
  expect_bits("to f16, a tie goes to even, down", to_f16(1 + 0x1p-11f), 0x3c00);
  expect_bits("to f16, a tie goes to even, up", to_f16(1 + 0x3p-11f), 0x3c02);
  expect_bits("2^-24 to f16", to_f16(0x1p-24f), 1);
  expect_bits("2^-25 to f16, a tie", to_f16(0x1p-25f), 0);
  expect_bits("just above 2^-25 to f16", to_f16(0x1.000002p-25f), 1);
  expect_bits("-0 to f16", to_f16(-0.f), 0x8000);
  expect("f16's least subnormal", from_f16(1), 0x1p-24f);
  expect("f16's largest subnormal", from_f16(0x83ff), -0x1.ff8p-15f);
  expect("f16's infinity", from_f16(0xfc00), -INF);
}

static float reduce_down(float x) { return first(_mm512_reduce_ps(_mm512_set1_ps(x), 9)); }
static void expect_reduce() {
  expect("reduce", reduce_down(-1.25f), 0.75f);
  expect("reduce of a whole number", reduce_down(-3), -0.f);
  expect("reduce rounds downwards", reduce_down(-0x1p-40f), 1 - 0x1p-24f);
  expect("reduce of infinity", reduce_down(-INF), 0);
}

#ifdef ISA_AVX512_BF16
static uint32_t to_bf16(uint32_t bits) {
  const auto y = _mm512_cvtneps_pbh(_mm512_set1_ps(as<float>(bits)));
  return as<uint32_t>(as<__m256>(y)[0]) & 0xffff;
}
static void expect_bf16() {
  expect_bits("to bf16, a tie goes to even, down", to_bf16(0x3f808000), 0x3f80);
  expect_bits("to bf16, a tie goes to even, up", to_bf16(0x3f818000), 0x3f82);
  expect_bits("to bf16, just above a tie", to_bf16(0x3f808001), 0x3f81);
  expect_bits("the largest float to bf16", to_bf16(0x7f7fffff), 0x7f80);
  expect_bits("the largest subnormal to bf16", to_bf16(0x007fffff), 0);
  expect_bits("a negative subnormal to bf16", to_bf16(0x80400000), 0x8000);
  expect_bits("a NaN with a low payload to bf16", to_bf16(0x7f800001), 0x7fc0);
  expect_bits("a negative NaN to bf16", to_bf16(0xffffffff), 0xffff);
}

// sum + odd product + even product; the factors are bf16 numbers.
static float dot(float sum, float odd_a, float odd_b, float even_a, float even_b) {
  const auto pair = [](float odd, float even) {
    return as<__m512bh>(_mm512_set1_epi32(int(as<uint32_t>(odd) | as<uint32_t>(even) >> 16)));
  };
  return first(_mm512_dpbf16_ps(_mm512_set1_ps(sum), pair(odd_a, even_a), pair(odd_b, even_b)));
}
static void expect_dot() {
  const float big = 0x1p12f, least = 0x1p-126f;
  expect("odd product first: 1 + 2^24 is 2^24", dot(1, big, big, big, -big), 0);
  expect("odd product first: 1 - 2^24 is exact", dot(1, -big, big, big, big), 1);
  expect("dot, a tie goes to even", dot(0x1p24f, 3, 1, 0, 0), 0x1p24f + 4);
  expect("dot, a subnormal sum is zero", dot(0x1p-127f, 0, 0, 0, 0), 0);
  expect("dot, a subnormal factor is zero", dot(0, 0x1p-133f, 0x1p120f, 0, 0), 0);
  expect("dot, a subnormal step is zero", dot(least, -0x1p-64f, 0x1p-63f, least, 1), least);
  expect("dot, a subnormal result is zero", dot(least, 0, 0, -0x1p-64f, 0x1p-63f), 0);
  expect("dot, infinity minus infinity", dot(INF, -INF, 1, 1, 1), NOT_A_NUMBER);
}
#endif

static void expect_bytes() {
  const __m512i r = _mm512_dpbusd_epi32(_mm512_set1_epi32(7), _mm512_set1_epi32(-1),
                                        _mm512_set1_epi32(int(0x80808080)));
  expect_bits("four times 255 · -128", as<uint32_t>(as<__m512>(r)[0]), 7u - 4 * 255 * 128);
  const __m512i w = _mm512_dpwssd_epi32(_mm512_set1_epi32(7), _mm512_set1_epi32(int(0x80007fff)),
                                        _mm512_set1_epi32(int(0x7fff0002)));
  expect_bits("2 · 32767 - 32768 · 32767", as<uint32_t>(as<__m512>(w)[0]),
              7u + 2 * 32767 - 32768u * 32767);
}

// ---- hashes ----

static uint64_t state;
static uint32_t random_bits() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return uint32_t(state * 0x2545f4914f6cdd1dull >> 32);
}
// Floats of every kind: any bits, moderate, multiples of a half, and the corners.
static uint32_t random_float() {
  static const uint32_t CORNERS[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000,
                                     0x7f800001, 1,          0x807fffff, 0x00800000, 0x7f7fffff,
                                     0x3f800000, 0xbf000000, 0x3f808000, 0x33000000, 0x477ff000};
  const uint32_t bits = random_bits();
  switch (random_bits() % 4) {
    case 0: return bits;
    case 1: return (bits & 0x83ffffff) | 0x3c000000;
    case 2: return as<uint32_t>(float(int32_t(bits) >> 22) / 2);
    default: return CORNERS[bits % (sizeof(CORNERS) / sizeof(CORNERS[0]))];
  }
}
template <class V> static V random_vector(uint32_t (*next)()) {
  struct { uint32_t words[sizeof(V) / 4]; } x;
  for (uint32_t& word : x.words) word = next();
  return as<V>(x);
}

static uint64_t hash;
static void add(const void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) hash = (hash ^ static_cast<const uint8_t*>(p)[i]) * 0x100000001b3;
}
static void add(float x) {
  const uint32_t u = x != x ? 0x7fc00000 : as<uint32_t>(x);
  add(&u, sizeof(u));
}
template <class V> static void add_floats(const V& a) {
  float x[sizeof(V) / 4];
  std::memcpy(x, &a, sizeof(x));
  for (float lane : x) add(lane);
}
static void add(__m512 a) { add_floats(a); }
static void add(__m256 a) { add_floats(a); }
static void add(__m512i a) { add(&a, sizeof(a)); }
static void add(__m256i a) { add(&a, sizeof(a)); }
static void add(__m128i a) { add(&a, sizeof(a)); }
static void add(__mmask16 k) { add(&k, sizeof(k)); }

struct Inputs {
  const __m512 a = random_vector<__m512>(random_float), b = random_vector<__m512>(random_float),
               c = random_vector<__m512>(random_float);
  const __m512i i = random_vector<__m512i>(random_bits), j = random_vector<__m512i>(random_bits),
                l = random_vector<__m512i>(random_bits);
  const uint32_t k = random_bits();
  const __m256i half = random_vector<__m256i>(random_bits);
  const void* p = &a;
  alignas(64) uint8_t out[64] = {};
};

#ifdef ISA_AMX
// Three tiles of 16 × 16 words: sums, and both sides of a product.
struct Tiles {
  alignas(64) uint32_t words[3][256];
  template <class Draw> explicit Tiles(Draw draw) {
    for (auto& tile : words)
      for (uint32_t& word : tile) word = draw();
    asm volatile("" : : "r"(this) : "memory");
    _tile_loadd(0, words[0], 64);
    _tile_loadd(1, words[1], 64);
    _tile_loadd(2, words[2], 64);
  }
  const float* stored() {
    _tile_stored(0, words[0], 64);
    asm volatile("" : : "r"(this) : "memory");
    return reinterpret_cast<const float*>(words[0]);
  }
};
// Sums of random size, or bf16 of some; now and then such as are no numbers, or subnormal.
static uint32_t random_pair() { return as<uint32_t>(random_float()) >> 16 | (random_bits() << 16); }
#endif

template <class F> static void print(const char* name, F f) {
  state = 0x9e3779b97f4a7c15;
  hash = 0xcbf29ce484222325;
  for (int trial = 0; trial < 2000; ++trial) {
    Inputs in;
    f(in);
  }
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}
#define HASH(NAME, ...) print(#NAME, [](Inputs& in) { add(NAME(__VA_ARGS__)); })
#define HASH_STORE(NAME, ...)   \
  print(#NAME, [](Inputs& in) { \
    NAME(in.out, __VA_ARGS__);  \
    add(in.out, 64);            \
  })

template <int... PREDICATES>
static void add_comparisons(const Inputs& in, std::integer_sequence<int, PREDICATES...>) {
  (add(_mm512_cmp_ps_mask(in.a, in.b, PREDICATES)), ...);
}
// A maximum depends on the order of terms where there are NaNs, or zeros of both signs.
static __m512 ordered(__m512 a) {
  for (int i = 0; i < 16; ++i) a[i] = a[i] < 0 || a[i] > 0 ? a[i] : 1.f;
  return a;
}
// CPUs differ in the last bits; all are within 2^-14.
static void add_reciprocals(__m512 x) {
  const __m512 r = _mm512_rcp14_ps(x);
  for (int i = 0; i < 16; ++i) {
    if (std::fpclassify(x[i]) == FP_SUBNORMAL) continue;
    const bool exact = !std::isnormal(x[i]), normal = std::isnormal(1 / x[i]);
    if (exact) add(r[i]);
    else if (normal) add(float(std::fabs(double(x[i]) * r[i] - 1) < 0x1p-14));
  }
}

static void print_hashes() {
  HASH(_mm512_add_ps, in.a, in.b);
  HASH(_mm512_sub_ps, in.a, in.b);
  HASH(_mm512_mul_ps, in.a, in.b);
  HASH(_mm512_div_ps, in.a, in.b);
  HASH(_mm512_sqrt_ps, in.a);
  HASH(_mm512_max_ps, in.a, in.b);
  HASH(_mm512_min_ps, in.a, in.b);
  HASH(_mm512_unpacklo_ps, in.a, in.b);
  HASH(_mm512_unpackhi_ps, in.a, in.b);
  HASH(_mm512_fmadd_ps, in.a, in.b, in.c);
  HASH(_mm512_fmaddsub_ps, in.a, in.b, in.c);
  HASH(_mm512_add_epi32, in.i, in.j);
  HASH(_mm512_sub_epi8, in.i, in.j);
  HASH(_mm512_shuffle_epi8, in.i, in.j);
  HASH(_mm512_mullo_epi32, in.i, in.j);
  HASH(_mm512_and_si512, in.i, in.j);
  HASH(_mm512_unpacklo_epi16, in.i, in.j);
  HASH(_mm512_unpackhi_epi16, in.i, in.j);
  HASH(_mm512_slli_epi32, in.i, 16);
  HASH(_mm512_srli_epi32, in.i, 16);
  HASH(_mm512_srli_epi16, in.i, 4);

  HASH(_mm512_set1_ps, in.a[0]);
  HASH(_mm512_setzero_ps);
  HASH(_mm512_set1_epi32, int(in.k));
  HASH(_mm512_broadcast_i32x4, _mm256_castsi256_si128(in.half));
  HASH(_mm512_setr_epi32, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, int(in.k));
  HASH(_mm512_castsi512_ps, in.i);
  HASH(_mm512_castps_si512, in.a);
  print("_mm512_castps256_ps512", [](Inputs& in) {
    const __m512 wide = _mm512_castps256_ps512(as<__m256>(in.half));
    add(&wide, 32);
  });

  HASH(_mm512_loadu_ps, in.p);
  HASH(_mm512_loadu_si512, in.p);
  HASH(_mm512_maskz_loadu_ps, __mmask16(in.k), in.p);
  HASH(_mm512_maskz_loadu_epi16, in.k, in.p);
  HASH(_mm256_maskz_loadu_ps, __mmask8(in.k), in.p);
  HASH(_mm256_maskz_loadu_epi16, __mmask16(in.k), in.p);
  HASH(_mm256_maskz_loadu_epi8, in.k, in.p);
  HASH_STORE(_mm512_storeu_ps, in.a);
  HASH_STORE(_mm512_storeu_si512, in.i);
  HASH_STORE(_mm512_mask_storeu_ps, __mmask16(in.k), in.a);
  HASH_STORE(_mm256_mask_storeu_epi16, __mmask16(in.k), in.half);

  print("_mm512_cmp_ps_mask", [](Inputs& in) {
    add_comparisons(in, std::make_integer_sequence<int, 32>());
  });
  HASH(_mm512_mask_mov_epi32, in.i, __mmask16(in.k), in.j);
  HASH(_mm512_mask_set1_epi32, in.i, __mmask16(in.k), -1);
  HASH(_mm512_mask_blend_epi16, in.k, in.i, in.j);

  HASH(_mm512_permutexvar_ps, in.i, in.a);
  HASH(_mm512_permutex2var_ps, in.a, in.i, in.b);
  HASH(_mm512_permutexvar_epi16, in.i, in.j);
  HASH(_mm512_permute_ps, in.a, 0x1b);
  HASH(_mm512_permute_ps, in.a, 0xb1);
  HASH(_mm512_shuffle_ps, in.a, in.b, 0x44);
  HASH(_mm512_shuffle_ps, in.a, in.b, 0x1b);
  HASH(_mm512_shuffle_f32x4, in.a, in.b, 0x88);
  HASH(_mm512_shuffle_f32x4, in.a, in.b, 0x1b);

  HASH(_mm512_cvtepu16_epi32, in.half);
  HASH(_mm512_cvtepi8_epi16, in.half);
  HASH(_mm512_cvtepi32_epi16, in.i);
  HASH(_mm512_cvtepi32_epi8, in.i);
  HASH(_mm512_cvtepi32_ps, in.i);
  HASH(_mm512_cvtps_epi32, in.a);
  HASH(_mm512_dpbusd_epi32, in.i, in.j, in.l);
  HASH(_mm512_dpwssd_epi32, in.i, in.j, in.l);
  HASH(_mm512_cvtph_ps, in.half);
  HASH(_mm512_cvtps_ph, in.a, 0);

  HASH(_mm512_roundscale_ps, in.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  HASH(_mm512_roundscale_ps, in.a, 0x31);
  HASH(_mm512_roundscale_ps, in.a, 2);
  HASH(_mm512_roundscale_ps, in.a, 3);
  HASH(_mm512_reduce_ps, in.a, 0);
  HASH(_mm512_reduce_ps, in.a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  HASH(_mm512_reduce_ps, in.a, 0x22);
  HASH(_mm512_reduce_ps, in.a, 3);
  HASH(_mm512_scalef_ps, in.a, in.b);
  print("_mm512_rcp14_ps", [](Inputs& in) { add_reciprocals(in.a); });
  HASH(_mm512_reduce_add_ps, in.a);
  HASH(_mm512_reduce_max_ps, ordered(in.a));

#ifdef ISA_AVX512_BF16
  print("_mm512_cvtneps_pbh", [](Inputs& in) { add(as<__m256i>(_mm512_cvtneps_pbh(in.a))); });
  print("_mm512_cvtne2ps_pbh", [](Inputs& in) {
    add(as<__m512i>(_mm512_cvtne2ps_pbh(in.a, in.b)));
  });
  print("_mm512_dpbf16_ps", [](Inputs& in) {
    add(_mm512_dpbf16_ps(in.a, as<__m512bh>(in.b), as<__m512bh>(in.c)));
    add(_mm512_dpbf16_ps(in.a, as<__m512bh>(in.i), as<__m512bh>(in.j)));
  });
#endif

#ifdef ISA_AMX
#define HASH_TILES(NAME, DRAW, ADD)                   \
  print(#NAME, [](Inputs&) {                          \
    Tiles tiles(DRAW);                                \
    NAME(0, 1, 2);                                    \
    const float* found = tiles.stored();              \
    for (int i = 0; i < 256; ++i) ADD;                \
  })
  HASH_TILES(_tile_dpbf16ps, random_pair, add(found[i]));
  HASH_TILES(_tile_dpbssd, random_bits, add(found + i, 4));
  HASH_TILES(_tile_dpbsud, random_bits, add(found + i, 4));
  HASH_TILES(_tile_dpbusd, random_bits, add(found + i, 4));
  HASH_TILES(_tile_dpbuud, random_bits, add(found + i, 4));
#endif
}

}  // namespace ISA
}  // namespace llama_fast

#ifdef ISA_AMX
#include "../../csrc/bindings/tiles.h"
#include "../../csrc/cpu/simd/amx.h"
#endif

int main() {
  using namespace llama_fast::ISA;
#ifdef ISA_AMX
  if (!MAY_USE_TILES) return 2;
  const TileRegisters registers;
#endif
  expect_scalef();
  expect_f16();
  expect_reduce();
#ifdef ISA_AVX512_BF16
  expect_bf16();
  expect_dot();
#endif
  expect_bytes();
  print_hashes();
  return wrong;
}
