// Decode (split-KV): at most 16 rows to a KV head, so that time goes into reading keys
// and values, once. Dao et al., "Flash-Decoding" (2023).
//
// The keys of a KV head are split over blocks, and those of a block over its warps, 16 keys at a time.
// Each warp has a pipeline of its own: STAGES tiles of 16 keys and values are on their way by cp.async
// or in use, and no warp waits for another until all are done and merged (kv_splits.cuh).
#pragma once

#include <common/pdl.cuh>

#include "kv_splits.cuh"
#include "tiles.cuh"

namespace llama_fast::cuda {

constexpr int DECODE_KEYS = 16, DECODE_STAGES = 3;

template <class T, int D> struct DecodeShared {
  struct Pipeline { T k[DECODE_STAGES][DECODE_KEYS * D], v[DECODE_STAGES][DECODE_KEYS * D]; };
  union {
    Pipeline pipelines[DECODE_WARPS];
    Partial<D> partials[DECODE_WARPS][DECODE_ROWS];  // when the pipelines are done
  };
  bool last;
};

template <class T, int D>
__global__ void __launch_bounds__(DECODE_WARPS * WARP, 1)
attention_decode_kernel(AttentionArgs a, AttentionScratch scratch) {
  auto& shared = shared_memory<DecodeShared<T, D>>();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  // Only gridDim.x goes beyond 65,535: a batch may.
  const Problem<T> problem(a, blockIdx.y, blockIdx.x);
  const int limit[2] = {problem.limit(g), problem.limit(g + 8)};
  const Split<DECODE_KEYS> split(problem.limit(problem.rows() - 1), blockIdx.z, gridDim.z, warp);

  auto& pipeline = shared.pipelines[warp];
  const auto copy = [&](int round) {
    if (split.has(round)) {
      copy_tile<D, DECODE_KEYS, WARP>(pipeline.k[round % DECODE_STAGES], problem.k, problem.k_stride,
                                   split.first_key(round), split.end, lane);
      copy_tile<D, DECODE_KEYS, WARP>(pipeline.v[round % DECODE_STAGES], problem.v, problem.v_stride,
                                   split.first_key(round), split.end, lane);
    }
    cp_async_commit();  // an empty one too: groups are counted
  };
  for (int round = 0; round < DECODE_STAGES - 1; ++round) copy(round);

  const Queries<D> q = load_queries<D, T>({problem.query(g), problem.query(g + 8)}, t);
  Softmax softmax;
  float o[D / 8][4] = {};
  for (int round = 0; split.has(round); ++round) {
    cp_async_wait<DECODE_STAGES - 2>();
    __syncwarp();  // other lanes' copies are here, and nobody reads the stage that is filled next
    copy(round + DECODE_STAGES - 1);
    float scores[DECODE_KEYS / 8][4];
    multiply_keys<T, D, DECODE_KEYS>(scores, q, pipeline.k[round % DECODE_STAGES], lane);
    scale_and_mask(scores, a.scale.unit, split.first_key(round), limit, t);
    take_scores(softmax, scores, a.scale.rest, o);
    multiply_values<T, D, DECODE_KEYS>(o, scores, pipeline.v[round % DECODE_STAGES], lane);
  }
  finish(softmax);
  cp_async_wait<0>();
  merge_splits<T, D>(a, scratch, problem, shared.partials, shared.last, softmax, o,
                     [&](int n, int j) { return n * 8 + 2 * t + j; });
}

}  // namespace llama_fast::cuda
