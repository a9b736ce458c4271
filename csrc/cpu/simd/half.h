// The 16-bit storage types and their conversions, one element at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace llama_fast {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

namespace ISA {

static inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Moves the exponent by 2^112 through a product, so that subnormals come out exact.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
static inline void from_float(float x, float& y) { y = x; }
static inline void from_float(float x, bf16& y) {
  const uint32_t u = bits_of(x);
  y.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void from_float(float x, f16& y) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) y.bits = uint16_t(sign | 0x7e00);
  else if (magnitude >= 0x477ff000) y.bits = uint16_t(sign | 0x7c00);  // 65520 and above
  else if (magnitude < 0x38800000) {  // below 2^-14: let the adder round at 2^-24
    y.bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  } else {
    y.bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

}  // namespace ISA
}  // namespace llama_fast
