// h = gate / (1 + e^-gate) · up. Rows are cut into pieces, so that the single row of a decode step
// is shared between the threads too.
#include "dispatch.h"
#include "parallel.h"
#include "simd/pair.h"

namespace llama_fast {
namespace ISA {

// The half types need 12 bits of e^x and of the quotient, float needs them all.
template <class T, class V> static inline V silu(V z) {
  if constexpr (sizeof(T) == 2) {
    return divide_half(z, set(1.f) + exp_half(zero() - z));
  } else {
    return z / (set(1.f) + exp(zero() - z));
  }
}

template <class T> static void swiglu_rows(const SwigluArgs& a) {
  constexpr int64_t PIECE = 2048;
  const int64_t pieces = (a.F + PIECE - 1) / PIECE;
  parallel_for(a.gate_rows.count() * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p / pieces, first = p % pieces * PIECE;
      const T* gate = static_cast<const T*>(a.gate) + a.gate_rows.offset(n) + first;
      const T* up = static_cast<const T*>(a.up) + a.up_rows.offset(n) + first;
      T* h = static_cast<T*>(a.h) + n * a.F + first;
      for_each_pair(a.F - first < PIECE ? a.F - first : PIECE, [&](int64_t i, auto width) {
        store(h + i, silu<T>(load(gate + i, width)) * load(up + i, width), width);
      });
    }
  });
}

void swiglu(const SwigluArgs& a) {
  with_type(a.dtype, [&](auto t) { swiglu_rows<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
