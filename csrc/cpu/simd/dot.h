// Sums of products along rows of weights as they are stored, with activations packed once per call.
//
// A step is STEP elements of a row, taken as PARTS vectors. Which element goes to which lane is
// free, as long as weights and activations agree; so a type takes the order that costs least.
#pragma once

#include <type_traits>

#include "pair.h"

namespace llama_fast {
namespace ISA {

template <class T> struct Dot {
  using Packed = float;
  static constexpr int PARTS = 2, STEP = 2 * vf::W;
  // Elements in the 4 bytes of a packed unit, and the first of them: where load2 put it.
  static constexpr int UNIT = 1;
  static constexpr int element(int unit) {
    if (!std::is_same_v<T, bf16>) return unit;
    return unit < vf::W ? 2 * unit : 2 * (unit - vf::W) + 1;
  }

  template <int PART> static vf weights(const T* w) { return PART ? load2(w).b : load2(w).a; }
  static vf activations(const float* x) { return load(x); }
  static vf add(vf w, vf x, vf acc) { return fma(w, x, acc); }
  static void pack(const T* x, float* packed) {
    store(packed, weights<0>(x));
    store(packed + vf::W, weights<1>(x));
  }
};

#ifdef ISA_AVX2
// The odd elements by two shifts: load2's mask would take one of 16 registers, all of them in use.
template <> template <> inline vf Dot<bf16>::weights<1>(const bf16* w) {
  __m256i x = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), 16);
  asm("" : "+x"(x));  // GCC would make it the mask again
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
}
#endif

#ifdef ISA_HAS_PAIRS
// One instruction multiplies pairs of bf16 and adds both products to a lane: nothing to convert.
template <> struct Dot<bf16> {
  using Packed = bf16;
  static constexpr int PARTS = 1, STEP = 2 * vf::W;
  static constexpr int UNIT = 2;
  static constexpr int element(int unit) { return 2 * unit; }

  template <int PART> static vf weights(const bf16* w) { return load_pairs(w); }
  static vf activations(const bf16* x) { return load_pairs(x); }
  static vf add(vf w, vf x, vf acc) { return dot_pairs(w, x, acc); }
  static void pack(const bf16* x, bf16* packed) { std::memcpy(packed, x, STEP * sizeof(bf16)); }
};
#endif

}  // namespace ISA
}  // namespace llama_fast
