// The rotation of one head's pairs by one position's angles, which rope and kv_append share.
#pragma once

#include "numeric.cuh"

namespace llama_fast::cuda {

// Pairs that a thread rotates: with whole vectors, those of two accesses of 16 bytes.
template <class T, bool WIDE> constexpr int PAIRS = WIDE ? VECTOR<T> : 1;

// The pairs p … p + PAIRS - 1 of x (D,) into y (D,); cos and sin (D/2,). Pair p is the elements
// (p, p + D/2), or (2p, 2p + 1) if interleaved. In float32, rounded once.
template <class T, int PAIRS>
__device__ __forceinline__ void rotate(const T* x, T* y, const float* __restrict__ cos,
                                       const float* __restrict__ sin, int64_t p, int64_t D,
                                       bool interleaved) {
  const int64_t first = interleaved ? 2 * p : p, second = interleaved ? 2 * p + PAIRS : p + D / 2;
  const Pack<T, PAIRS> a = load<PAIRS>(x + first), b = load<PAIRS>(x + second);
  const Pack<float, PAIRS> c = load<PAIRS>(cos + p), s = load<PAIRS>(sin + p);
  Pack<T, PAIRS> rotated_a, rotated_b;
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
      rotated_a.v[i] = new_a;
      rotated_b.v[i] = new_b;
    } else {
      (j < PAIRS ? rotated_a : rotated_b).v[j % PAIRS] = new_a;
      (j + 1 < PAIRS ? rotated_a : rotated_b).v[(j + 1) % PAIRS] = new_b;
    }
  }
  store(y + first, rotated_a);
  store(y + second, rotated_b);
}

// Whether the heads' elements lie in whole vectors.
inline bool whole(int vector, const Heads& heads) {
  return aligned({heads.data}) &&
         whole(vector, {heads.stride_b, heads.stride_t, heads.stride_h});
}

}  // namespace llama_fast::cuda
