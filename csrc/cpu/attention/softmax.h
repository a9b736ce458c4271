// What both ways of computing attention share: which keys a query sees, and the online softmax.
//
// They sum in one order, so that a query's result is the same with others beside it and alone: a score is
// a chain of multiply-adds over the units of D; the softmax goes on tile by tile of TILE keys, which
// start at multiples of their size; the values of a tile are a chain over the units of its keys, and
// that sum is added to those of the tiles before, times their correction.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../../args.h"
#include "../simd/simd.h"

namespace llama_fast {
namespace ISA {

constexpr int TILE = vf::W == 16 ? 128 : 64;  // keys

// A row of the batch. The queries that it sees nothing for come first and are left out below.
struct Row {
  int64_t keys;     // how many are valid
  int64_t first;    // the first query that sees a key; T when there is none
  int64_t queries;  // T - first
  int64_t ahead;    // a causal query t sees the first `ahead + t` keys

  Row(const AttentionArgs& a, int64_t b) {
    const int64_t length = a.lengths ? std::max(a.lengths[b], -a.T) : a.S;
    keys = std::max<int64_t>(length, 0);
    first = a.causal ? std::min(std::max<int64_t>(a.T - length, 0), a.T) : keys ? 0 : a.T;
    queries = a.T - first;
    ahead = length - a.T + 1;
  }
  int64_t visible(const AttentionArgs& a, int64_t t) const { return a.causal ? ahead + t : keys; }
};

// How q·k and weights·v are multiplied, in units of 4 bytes: floats, or where the CPU multiplies
// them two at a time, pairs of bf16. A unit holds `size` elements.
template <class T> struct Unit {
  static constexpr int size = 1;
  template <class Width> static vf load(const T* p, Width width) { return ISA::load(p, width); }
  static vf madd(vf a, vf b, vf c) { return fma(a, b, c); }
};
#ifdef ISA_HAS_PAIRS
template <> struct Unit<bf16> {
  static constexpr int size = 2;
  static vf load(const bf16* p, Full) { return load_pairs(p); }
  static vf load(const bf16* p, int n) { return load_pairs(p, n); }
  static vf madd(vf a, vf b, vf c) { return dot_pairs(a, b, c); }
  static vf first(vf x) { return first_of_pairs(x); }
  // The first n of 2W elements of two rows as pairs, one of each row, in order; next is null for zeros.
  static void pair(const bf16* row, const bf16* next, int n, vf (&x)[2]) {
    pair_rows(load_pairs(row, n), next ? load_pairs(next, n) : zero(), x[0], x[1]);
    in_order(x[0], x[1], x[0], x[1]);
  }
};
#endif

// The D elements at `from` as units, at `to`, and zeros behind them to the end of a vector.
template <class T> static void put_units(const T* from, int64_t D, float* to) {
  constexpr int RUN = vf::W * Unit<T>::size;
  for (int64_t d = 0; d < D; d += RUN, to += vf::W)
    store(to, d + RUN <= D ? Unit<T>::load(from + d, Full{}) : Unit<T>::load(from + d, int(D - d)));
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline float first_lane(vf x) {
  float lanes[vf::W];
  store(lanes, x);
  return lanes[0];
}
static inline float exp2_of(float x) { return first_lane(exp2(set(x))); }

// What is subtracted from scores: their largest, or 0 where that is -infinity.
static inline float base_of(float m) {
  return m == -std::numeric_limits<float>::infinity() ? 0.f : m;
}

// 2^((unit · s - base) · rest), the weight of a score.
static inline vf weight_of(vf s, const ScoreScale& scale, float base) {
  return exp2(fma(s, set(scale.unit), set(-base)) * set(scale.rest));
}
// The same of an older maximum, which `unit` has multiplied already.
static inline float correction_of(float m, const ScoreScale& scale, float base) {
  return exp2_of((m - base) * scale.rest);
}

// Softmax over a part of a query's keys. Turns the scores s[0 … count) into weights
// 2^((unit · s - m) · rest), in units of T and in place, with zeros up to `padded` elements. `m` is
// the largest unit · s so far and `l` the sum of the weights; what was summed under an older
// m has to be multiplied by the result. s has room for whole vectors.
template <class T>
static float softmax_part(float* s, int64_t count, int64_t padded, const ScoreScale& scale,
                          float& m, float& l) {
  using Weight = typename std::conditional<Unit<T>::size == 2, T, float>::type;
  Weight* weights = reinterpret_cast<Weight*>(s);  // never ahead of the scores that are left
  constexpr int W = vf::W;
  float correction = 1.f;
  int64_t i = 0;
  if (count > 0) {
    for (int64_t j = count; j % W; ++j) s[j] = s[count - 1];
    vf largest = set(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < count; j += W) largest = max(largest, load(s + j) * set(scale.unit));
    const float before = m;
    m = std::max(m, max_of(largest));
    const float base = base_of(m);
    if (m != before) correction = correction_of(before, scale, base);
    vf sum_of = zero();
    for (; i + W <= count; i += W) {
      const vf x = weight_of(load(s + i), scale, base);
      sum_of = sum_of + x;
      store(weights + i, x);
    }
    if (i < count) {
      float last[W];
      store(last, weight_of(load(s + i), scale, base));
      const vf x = load(last, int(count - i));
      sum_of = sum_of + x;
      store(weights + i, x);
      i += W;
    }
    l = first_lane(fma(set(l), set(correction), set(sum(sum_of))));
  }
  for (; i < padded; i += W) store(weights + i, zero());
  return correction;
}

// An error of lse is one of every weight that the backward pass makes from it: not in float itself.
template <class T>
using LseOf = typename std::conditional<std::is_same<T, float>::value, double, float>::type;

template <class T>
static void write_lse(const AttentionArgs& a, int64_t b, int64_t t, int64_t h, double lse) {
  static_cast<LseOf<T>*>(a.lse)[(b * a.H + h) * a.lse_stride + t] = LseOf<T>(lse);
}

// The result of query head h of token t: what was accumulated over the sum of its weights, or zeros
// without keys; and where asked for, the logarithm of that sum.
template <class T>
static void write_result(const AttentionArgs& a, int64_t b, int64_t t, int64_t h,
                         const float* sums_of, float m, float l) {
  const int64_t D = a.D;
  T* o = static_cast<T*>(a.o) + ((b * a.T + t) * a.H + h) * D;
  // log 0 is -infinity.
  if (a.lse)
    write_lse<T>(a, b, t, h, double(m) * a.scale.factor + std::log(double(l)));
  // Of scores that are all -infinity there is no softmax: m - m is NaN.
  const vf inverse = set(l == 0.f ? 0.f : 1.f / l + (m - m));
  for_each_vector(D, [&](int64_t d, auto width) {
    store(o + d, load(sums_of + d, width) * inverse, width);
  });
}

}  // namespace ISA
}  // namespace llama_fast
