// Decode against keys and values in 8 bits: decode.cuh with integers in the tiles, 32 keys each.
//
// The quantised values themselves are multiplied. The scales of the keys multiply the scores, those of the values
// the weights, so neither stands inside of a sum. Weights times scales must fit float16, and a key that a
// row attends to may have a scale far below the others', so the output of a row is summed in parts of
// its largest product of a weight and a scale so far.
#pragma once

#include <common/pdl.cuh>

#include "kv_splits.cuh"
#include "tiles_quantized.cuh"

namespace llama_fast::cuda {

constexpr int QUANTIZED_STAGES = 2;
constexpr float MOST_UNITS = 32768.0f;  // in a product, so that float16 holds small ones beside it
constexpr float LEAST_UNIT = 1e-37f;    // whose inverse is finite

template <int D> struct DecodeQuantizedShared {
  union {
    QuantizedTile<D> pipelines[DECODE_WARPS][QUANTIZED_STAGES];
    Partial<D> partials[DECODE_WARPS][DECODE_ROWS];  // when the pipelines are done
  };
  bool last;
};

// take_scores, with weights that are multiplied by the scales of their values. The output of row g + 8i is
// in units of unit[i].
template <int D>
__device__ __forceinline__ void take_quantized_scores(Softmax& softmax, float (&unit)[2],
                                                  float (&scores)[QUANTIZED_KEYS / 8][4], float rest,
                                                  const float* v_scales, float (&o)[D / 8][4],
                                                  int t) {
  constexpr int N = QUANTIZED_KEYS / 8;
  float correction[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max = MINUS_INFINITY;
#pragma unroll
    for (int n = 0; n < N; ++n) max = fmaxf(max, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
    correction[i] = rescale(softmax, i, max, rest);
    const float base = base_of(softmax.m[i]);
    float largest = unit[i] * correction[i] * MOST_UNITS;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(v_scales + n * 8 + 2 * t);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float weight = exp2_fast((scores[n][2 * i + j] - base) * rest);
        softmax.l[i] += weight;
        scores[n][2 * i + j] = weight * (j ? scale.y : scale.x);
        largest = fmaxf(largest, scores[n][2 * i + j]);
      }
    }
    const float before = unit[i];
    unit[i] = fmaxf(quad_max(largest) / MOST_UNITS, LEAST_UNIT);
    correction[i] *= before / unit[i];
    const float inverse = 1.0f / unit[i];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      scores[n][2 * i] *= inverse;
      scores[n][2 * i + 1] *= inverse;
    }
  }
  // Soon no score is the largest of all so far.
  if (!__any_sync(WHOLE_WARP, correction[0] != 1.0f || correction[1] != 1.0f)) return;
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) o[n][j] *= correction[j / 2];
}

template <class T, int D>
__global__ void __launch_bounds__(DECODE_WARPS * WARP, 1)
attention_decode_quantized_kernel(const __grid_constant__ AttentionArgs a,
                               const __grid_constant__ AttentionScratch scratch) {
  auto& shared = shared_memory<DecodeQuantizedShared<D>>();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  // Only gridDim.x goes beyond 65,535: a batch may.
  const int kv = blockIdx.y, b = blockIdx.x;
  const Problem<T, int8_t> problem(a, kv, b);
  const int limit[2] = {problem.limit(g), problem.limit(g + 8)};
  const Split<QUANTIZED_KEYS> split(problem.limit(problem.rows() - 1), blockIdx.z, gridDim.z, warp);
  const HeadStrides &ks_stride = a.k_scales.stride, &vs_stride = a.v_scales.stride;
  const float* k_scales = a.k_scales.data + b * ks_stride.b + kv * ks_stride.h;
  const float* v_scales = a.v_scales.data + b * vs_stride.b + kv * vs_stride.h;

  auto& pipeline = shared.pipelines[warp];
  const auto copy = [&](int round) {
    if (split.has(round)) {
      QuantizedTile<D>& tile = pipeline[round % QUANTIZED_STAGES];
      const int first = split.first_key(round), end = split.end;
      copy_quantized_keys<D>(tile.k, problem.k, problem.k_stride, first, end, lane);
      copy_scales(tile.k_scales, k_scales, ks_stride.t, first, end, lane);
      copy_quantized_values<D>(tile.v, problem.v, problem.v_stride, first, end, lane);
      copy_scales(tile.v_scales, v_scales, vs_stride.t, first, end, lane);
    }
    cp_async_commit();  // an empty one too: groups are counted
  };
  for (int round = 0; round < QUANTIZED_STAGES - 1; ++round) copy(round);

  const QuantizedQueries<D> q =
      load_quantized_queries<D, T>({problem.query(g), problem.query(g + 8)}, t);
  const float step[2] = {q.step[0] * a.scale.unit, q.step[1] * a.scale.unit};
  Softmax softmax;
  float o[D / 8][4] = {}, unit[2] = {};
  for (int round = 0; split.has(round); ++round) {
    cp_async_wait<QUANTIZED_STAGES - 2>();
    __syncwarp();  // other lanes' copies are here, and nobody reads the stage that is filled next
    copy(round + QUANTIZED_STAGES - 1);
    const QuantizedTile<D>& tile = pipeline[round % QUANTIZED_STAGES];
    float scores[QUANTIZED_KEYS / 8][4];
    multiply_quantized_keys<D>(scores, q, tile.k, lane);
#pragma unroll
    for (int n = 0; n < QUANTIZED_KEYS / 8; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(tile.k_scales + n * 8 + 2 * t);
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[n][j] *= step[j / 2] * (j % 2 ? scale.y : scale.x);
    }
    mask(scores, split.first_key(round), limit, t);
    take_quantized_scores<D>(softmax, unit, scores, a.scale.rest, tile.v_scales, o, t);
    multiply_quantized_values<D>(o, scores, tile.v, lane);
  }
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) o[n][j] *= unit[j / 2];
  finish(softmax);
  cp_async_wait<0>();
  merge_splits<T, D>(a, scratch, problem, shared.partials, shared.last, softmax, o,
                     [&](int n, int j) { return (2 * t + j) * (D / 8) + n; });
}

}  // namespace llama_fast::cuda
