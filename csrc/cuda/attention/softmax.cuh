// The online softmax of a warp's 16 rows, in base 2: what has been summed is corrected when a larger
// score comes. A lane has the rows g and g + 8, and of each the columns of its quad.
#pragma once

#include <common/ptx.cuh>

#include "../common/reduce.cuh"

namespace llama_fast::cuda {

constexpr float MINUS_INFINITY = -__builtin_inff();

struct Softmax {
  float m[2] = {MINUS_INFINITY, MINUS_INFINITY};  // the largest score, times the scale's unit
  float l[2] = {0.0f, 0.0f};  // the sum of the weights; of the lane's columns only, until finish()
};

// Of a row: over the four lanes that hold it.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(WHOLE_WARP, x, 1);
  return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}

// What is subtracted from scores: their largest, or 0 where no key has been seen.
__device__ __forceinline__ float base_of(float max) { return max == MINUS_INFINITY ? 0.0f : max; }

// Hides the scores of the keys first + 8n + … from limit[i] on from row g + 8i.
template <int N>
__device__ __forceinline__ void mask(float (&scores)[N][4], int first, const int (&limit)[2],
                                     int t) {
  const bool all = first + 8 * N <= min(limit[0], limit[1]);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = first + 8 * n + 2 * t + j % 2;
      scores[n][j] = all || key < limit[j / 2] ? scores[n][j] : MINUS_INFINITY;
    }
}

template <int N>
__device__ __forceinline__ void scale_and_mask(float (&scores)[N][4], float unit, int first,
                                               const int (&limit)[2], int t) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] *= unit;
  mask(scores, first, limit, t);
}

// A larger score has come to row g + 8i, or none: what was summed is to be multiplied by the result.
__device__ __forceinline__ float rescale(Softmax& softmax, int i, float max, float rest) {
  max = quad_max(fmaxf(softmax.m[i], max));
  const float correction = exp2_fast((softmax.m[i] - base_of(max)) * rest);
  softmax.m[i] = max;
  softmax.l[i] *= correction;
  return correction;
}

// Turns scores, times the scale's unit, into weights, and brings `softmax` and the output up to date.
template <int N, int COLUMNS>
__device__ __forceinline__ void take_scores(Softmax& softmax, float (&scores)[N][4],
                                            float rest, float (&o)[COLUMNS][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max = MINUS_INFINITY;
#pragma unroll
    for (int n = 0; n < N; ++n) max = fmaxf(max, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
    const float correction = rescale(softmax, i, max, rest), base = base_of(softmax.m[i]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        scores[n][j] = exp2_fast((scores[n][j] - base) * rest);
        softmax.l[i] += scores[n][j];
      }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
      o[n][2 * i] *= correction;
      o[n][2 * i + 1] *= correction;
    }
  }
}

// The same for scores that are not scaled yet, with a unit above 0: each takes one multiply-add instead of
// two operations. `softmax.m` is without the unit, too. The caller brings the output up to date with
// `correction`, one for each row.
template <int N>
__device__ __forceinline__ void take_unscaled(Softmax& softmax, float (&scores)[N][4],
                                              const ScoreScale& scale, float (&correction)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max = softmax.m[i];
#pragma unroll
    for (int n = 0; n < N; ++n) max = fmaxf(max, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
    max = quad_max(max);
    const float base = base_of(max * scale.unit);
    correction[i] = exp2_fast(fmaf(softmax.m[i], scale.unit, -base) * scale.rest);
    softmax.m[i] = max;
    softmax.l[i] *= correction[i];
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        scores[n][j] = exp2_fast(fmaf(scores[n][j], scale.unit, -base) * scale.rest);
        softmax.l[i] += scores[n][j];
      }
  }
}

__device__ __forceinline__ void finish(Softmax& softmax) {
  softmax.l[0] = quad_sum(softmax.l[0]);
  softmax.l[1] = quad_sum(softmax.l[1]);
}

// log Σ exp(score); -infinity where there was no key.
__device__ __forceinline__ float log_sum(float max, float sum, const ScoreScale& scale) {
  return sum == 0.0f ? MINUS_INFINITY : fmaf(max, scale.factor, logf(sum));
}

}  // namespace llama_fast::cuda
