// IEEE binary16 on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half { uint16_t bits; };

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float f;
  if (exponent == 31) f = fraction ? NAN : INFINITY;
  else if (exponent == 0) f = std::ldexp(float(fraction), -24);
  else f = std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits & 0x8000 ? -f : f;
}

inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (f != f) return {0x7fff};
  if (a >= 65520.0f) return {uint16_t(sign | 0x7c00)};  // half a unit above the largest
  int exponent;
  std::frexp(a, &exponent);  // a = 0.5 … 1 times 2^exponent
  const int unit = a == 0.0f || exponent < -13 ? -24 : exponent - 11;
  // nearbyint rounds ties to even; a carry into the next exponent comes out right by itself.
  const uint32_t units = uint32_t(std::nearbyint(std::ldexp(a, -unit)));
  const uint32_t bits = unit == -24 ? units : (uint32_t(unit + 24) << 10) + units;
  return {uint16_t(sign | bits)};
}
