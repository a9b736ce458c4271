// The rotation of one head's pairs by one position's angles, which rope and both kv_appends share.
#pragma once

#include "numeric.cuh"

namespace llama_fast::cuda {

// Pairs that a thread rotates: with whole vectors, those of two accesses of 16 bytes.
template <class T, bool WIDE> constexpr int PAIRS = WIDE ? VECTOR<T> : 1;

// Neighbouring pairs of a head, in the two runs of elements in which they lie. Pair p is the elements
// (p, p + D/2), or (2p, 2p + 1) if interleaved.
template <class T, int PAIRS> struct HeadPairs { Pack<T, PAIRS> first, second; };

// Where the runs of the pairs p … p + PAIRS - 1 begin.
struct PairRuns {
  int64_t first, second;

  __device__ __forceinline__ PairRuns(int64_t p, int pairs, int64_t D, bool interleaved)
      : first(interleaved ? 2 * p : p), second(interleaved ? 2 * p + pairs : p + D / 2) {}
};

template <int PAIRS, class T>
__device__ __forceinline__ HeadPairs<T, PAIRS> load_pairs(const T* x, const PairRuns& at) {
  return {load<PAIRS>(x + at.first), load<PAIRS>(x + at.second)};
}

template <class T, int PAIRS>
__device__ __forceinline__ void store_pairs(T* y, const PairRuns& at,
                                            const HeadPairs<T, PAIRS>& pairs) {
  store(y + at.first, pairs.first);
  store(y + at.second, pairs.second);
}

// The pairs p … p + PAIRS - 1 rotated, in float32, rounded once; cos and sin (D/2,).
template <class T, int PAIRS>
__device__ __forceinline__ HeadPairs<T, PAIRS> rotated(const HeadPairs<T, PAIRS>& x,
                                                       const float* __restrict__ cos,
                                                       const float* __restrict__ sin, int64_t p,
                                                       bool interleaved) {
  const auto& [a, b] = x;
  const Pack<float, PAIRS> c = load<PAIRS>(cos + p), s = load<PAIRS>(sin + p);
  HeadPairs<T, PAIRS> y;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    // Interleaved, a and b together are 2·PAIRS neighbours, and pair i is at 2i and 2i + 1.
    const int j = 2 * i;
    const T own_a = !interleaved ? a.v[i] : j < PAIRS ? a.v[j % PAIRS] : b.v[j % PAIRS];
    const T own_b = !interleaved ? b.v[i] : j + 1 < PAIRS ? a.v[(j + 1) % PAIRS]
                                                          : b.v[(j + 1) % PAIRS];
    const float af = to_float(own_a), bf = to_float(own_b);
    const T new_a = from_float<T>(fmaf(af, c.v[i], -bf * s.v[i]));
    const T new_b = from_float<T>(fmaf(bf, c.v[i], af * s.v[i]));
    if (!interleaved) {
      y.first.v[i] = new_a;
      y.second.v[i] = new_b;
    } else {
      (j < PAIRS ? y.first : y.second).v[j % PAIRS] = new_a;
      (j + 1 < PAIRS ? y.first : y.second).v[(j + 1) % PAIRS] = new_b;
    }
  }
  return y;
}

// The pairs p … p + PAIRS - 1 of x (D,) rotated into y (D,).
template <class T, int PAIRS>
__device__ __forceinline__ void rotate(const T* x, T* y, const float* __restrict__ cos,
                                       const float* __restrict__ sin, int64_t p, int64_t D,
                                       bool interleaved) {
  const PairRuns at(p, PAIRS, D, interleaved);
  store_pairs(y, at, rotated(load_pairs<PAIRS>(x, at), cos, sin, p, interleaved));
}

// Whether the heads' elements lie in whole vectors.
inline bool whole(int vector, const Heads& heads) {
  return aligned({heads.data}) &&
         whole(vector, {heads.stride.b, heads.stride.t, heads.stride.h});
}

}  // namespace llama_fast::cuda
