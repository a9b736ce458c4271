// The random bits of llama_fast/ops/random_bits.py, a vector of words at a time, and stochastic rounding
// by them.
#pragma once

#include <cstdint>
#include <cstring>

#include "pair.h"

namespace llama_fast {
namespace ISA {

// W unsigned words. The compiler makes their arithmetic, in every instruction set.
typedef uint32_t vu __attribute__((vector_size(4 * vf::W)));

static inline vu as_words(vf x) { vu u; std::memcpy(&u, &x, sizeof(u)); return u; }

// The words of the places j, j + 1, … whose upper halves are that of j, for a key.
static inline vu random_words(int64_t j, const uint32_t (&key)[2]) {
  vu x;
  for (int lane = 0; lane < vf::W; ++lane) x[lane] = uint32_t(lane);
  x = (x + uint32_t(j)) ^ (key[0] ^ uint32_t(uint64_t(j) >> 32) * 0x9E3779B9u);
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15 ^ key[1]) * 0x846CA68Bu;
  return x ^ x >> 16;
}
static inline uint32_t random_word(int64_t j, const uint32_t (&key)[2]) {
  uint32_t x = uint32_t(j) ^ key[0] ^ uint32_t(uint64_t(j) >> 32) * 0x9E3779B9u;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15 ^ key[1]) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// Stores x at p, whose first element is number `at`: elements 2j and 2j + 1 are rounded to bfloat16 by
// the halves of word j. x is as load2 gives it, so that its two vectors share words.
static inline void store_random(bf16* p, vf2 x, int64_t at, const uint32_t (&key)[2], Pair) {
  const vu words = random_words(at / 2, key);
  const auto rounded = [](vf x, vu draw) {
    const vu u = as_words(x);
    // A NaN, which the sum may have carried into a number, becomes the NaN of all ones.
    return (u + draw) | vu((u & 0x7fffffffu) > 0x7f800000u);
  };
  const vu even = rounded(x.a, words & 0xffffu), odd = rounded(x.b, words >> 16);
  const vu both = even >> 16 | (odd & 0xffff0000u);
  std::memcpy(p, &both, sizeof(both));
}
// One vector or less of it, in order.
template <class Width>
static inline void store_random(bf16* p, vf x, int64_t at, const uint32_t (&key)[2], Width width) {
  float values[vf::W];
  store(values, x);
  int count = vf::W;
  if constexpr (std::is_same_v<Width, int>) count = width;
  for (int i = 0; i < count; ++i) {
    const uint32_t word = random_word((at + i) / 2, key), u = bits_of(values[i]);
    const uint32_t draw = (at + i) % 2 ? word >> 16 : word & 0xffffu;
    p[i].bits = (u & 0x7fffffffu) > 0x7f800000u ? 0xffff : uint16_t((u + draw) >> 16);
  }
}

}  // namespace ISA
}  // namespace llama_fast
