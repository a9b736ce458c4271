// The vector type `vf` of this instruction set, and what every instruction set shares.
//
// A kernel is one source, compiled once for each instruction set with -DISA=<namespace>. All it
// defines must live in namespace ISA or be static: a function shared between two of them could be
// linked from the wrong one and run an instruction that the CPU lacks.
#pragma once

#if defined(ISA_AVX512) || defined(ISA_AVX512_BF16)
#include "avx512.h"
#elif defined(ISA_AVX2)
#include "avx2.h"
#else
#include "scalar.h"
#endif

namespace llama_fast {
namespace ISA {

// A pointer that the compiler knows nothing of: what was loaded through it before is loaded again,
// where that is cheaper than a register.
template <class T> static inline const T* anew(const T* p) { asm("" : "+r"(p)); return p; }

// e^x. n = round(x / ln 2), x - n·ln 2 in two steps (Cody and Waite), then the Taylor polynomial of
// degree 7 on [-ln 2 / 2, ln 2 / 2]: within 2 ulp. Clamped so that the exponent stays in range:
// below -87.3 the result is 1.2e-38 or less, never a subnormal; above 88.4 it is infinity.
static inline vf exp(vf x) {
  x = min(max(x, set(-87.33654f)), set(89.f));
  const vf n = round(x * set(1.44269504f));
  vf r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  vf p = set(1.f / 5040);
  p = fma(p, r, set(1.f / 720));
  p = fma(p, r, set(1.f / 120));
  p = fma(p, r, set(1.f / 24));
  p = fma(p, r, set(1.f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1.f));
  p = fma(p, r, set(1.f));
  return scale2(p, n);
}

// 2^x. The polynomial is minimax in relative error on [-1/2, 1/2] with p(0) = 1: within 2 ulp.
// Clamped like exp; a NaN stays one.
static inline vf exp2(vf x) {
  x = min(set(127.f), max(set(-126.f), x));
  const vf n = round(x);
  const vf r = x - n;
  vf p = set(1.5353362e-4f);
  p = fma(p, r, set(1.3398875e-3f));
  p = fma(p, r, set(9.618437e-3f));
  p = fma(p, r, set(5.5503324e-2f));
  p = fma(p, r, set(0.24022648f));
  p = fma(p, r, set(0.69314718f));
  p = fma(p, r, set(1.f));
  return scale2(p, n);
}

// e^x within 2^-17, enough for what is rounded to a half type: 2^t with t = x / ln 2 is 2^whole ·
// 2^part, and a minimax polynomial of degree 4 is 2^part on [0, 1).
static inline vf exp_half(vf x) {
  vf whole, part;
  floor_and_rest(x * set(1.44269504f), whole, part);
  vf p = set(1.353416778e-2f);
  p = fma(p, part, set(5.201146007e-2f));
  p = fma(p, part, set(2.414427549e-1f));
  p = fma(p, part, set(6.930038333e-1f));
  p = fma(p, part, set(1.000002623f));
  return scale2(p, whole);
}

// Calls f(i, width) over [0, n): whole vectors as f(i, Full), then the rest as f(i, count).
struct Full {};
template <class T> static inline vf load(const T* p, Full) { return load(p); }
template <class T> static inline vf load_twice(const T* p, Full) { return load_twice(p); }
template <class T> static inline void store(T* p, vf x, Full) { store(p, x); }

template <class F> static inline void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + vf::W <= n; i += vf::W) f(i, Full{});
  if (i < n) f(i, int(n - i));
}

}  // namespace ISA
}  // namespace llama_fast
