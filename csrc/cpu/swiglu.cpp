// h = gate / (1 + e^-gate) · up. Rows are cut into pieces, so that the single row of a decode step
// is shared between the threads too.
//
// Backward, with s = 1 / (1 + e^-gate) and g the gradient of h, in one pass:
//     d_gate = g · up · s · (1 + gate · (1 - s))        d_up = g · gate · s
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

template <class T, class V> static inline V sigmoid(V z) {
  const V one = set_like(z, 1.f);
  if constexpr (sizeof(T) == 2) {
    return divide_half(one, set(1.f) + exp_half(zero() - z));
  } else {
    return one / (set(1.f) + exp(zero() - z));
  }
}

// Calls f(n, first, count) on pieces of the N rows of F elements.
template <class F> static void for_each_piece(int64_t N, int64_t width, F&& f) {
  constexpr int64_t PIECE = 2048;
  const int64_t pieces = (width + PIECE - 1) / PIECE;
  parallel_for(N * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p % pieces * PIECE;
      f(p / pieces, first, width - first < PIECE ? width - first : PIECE);
    }
  });
}

template <class T> static void swiglu_rows(const SwigluArgs& a) {
  for_each_piece(a.gate_rows.count(), a.F, [&](int64_t n, int64_t first, int64_t count) {
    const T* gate = static_cast<const T*>(a.gate) + a.gate_rows.offset(n) + first;
    const T* up = static_cast<const T*>(a.up) + a.up_rows.offset(n) + first;
    T* h = static_cast<T*>(a.h) + n * a.F + first;
    for_each_pair(count, [&](int64_t i, auto width) {
      store(h + i, silu<T>(load(gate + i, width)) * load(up + i, width), width);
    });
  });
}

template <class T> static void swiglu_backward_rows(const SwigluBackwardArgs& a) {
  for_each_piece(a.gate_rows.count(), a.F, [&](int64_t n, int64_t first, int64_t count) {
    const T* grad = static_cast<const T*>(a.grad) + a.grad_rows.offset(n) + first;
    const T* gate = static_cast<const T*>(a.gate) + a.gate_rows.offset(n) + first;
    const T* up = static_cast<const T*>(a.up) + a.up_rows.offset(n) + first;
    T* d_gate = static_cast<T*>(a.d_gate) + n * a.F + first;
    T* d_up = static_cast<T*>(a.d_up) + n * a.F + first;
    for_each_pair(count, [&](int64_t i, auto width) {
      const auto z = load(gate + i, width), s = sigmoid<T>(z);
      const auto gs = load(grad + i, width) * s;
      const auto slope = set(1.f) + z * (set(1.f) - s);
      store(d_gate + i, gs * load(up + i, width) * slope, width);
      store(d_up + i, gs * z, width);
    });
  });
}

void swiglu(const SwigluArgs& a) {
  with_type(a.dtype, [&](auto t) { swiglu_rows<decltype(t)>(a); });
}

void swiglu_backward(const SwigluBackwardArgs& a) {
  with_type(a.dtype, [&](auto t) { swiglu_backward_rows<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
