// Attention of few queries (decode): at most 16 rows to a KV head, so that time goes into reading keys
// and values, once. Dao et al., "Flash-Decoding" (2023).
//
// The keys of a KV head are split over blocks, and those of a block over its warps, 16 keys at a time.
// Each warp has a pipeline of its own: STAGES tiles of 16 keys and values are on their way by cp.async
// or in use, and no warp waits for another until all are done and merged (parts.cuh).
#pragma once

#include <common/overlap.cuh>

#include "parts.cuh"
#include "tiles.cuh"

namespace llama_fast::cuda {

constexpr int FEW_KEYS = 16, FEW_STAGES = 3;

template <class T, int D> struct FewQueriesShared {
  struct Pipeline { T k[FEW_STAGES][FEW_KEYS * D], v[FEW_STAGES][FEW_KEYS * D]; };
  union {
    Pipeline pipelines[FEW_WARPS];
    RowPart<D> parts[FEW_WARPS][FEW_ROWS];  // when the pipelines are done
  };
  bool last;
};

template <class T, int D>
__global__ void __launch_bounds__(FEW_WARPS * WARP, 1)
attention_few_kernel(AttentionArgs a, AttentionScratch scratch) {
  auto& shared = shared_memory<FewQueriesShared<T, D>>();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  wait_for_kernel_before();
  let_next_kernel_begin();
  // Only gridDim.x goes beyond 65,535: a batch may.
  const Problem<T> problem(a, blockIdx.y, blockIdx.x);
  const int limit[2] = {problem.limit(g), problem.limit(g + 8)};
  const Share<FEW_KEYS> share(problem.limit(problem.rows() - 1), blockIdx.z, gridDim.z, warp);

  auto& pipeline = shared.pipelines[warp];
  const auto copy = [&](int round) {
    if (share.has(round)) {
      copy_tile<D, FEW_KEYS, WARP>(pipeline.k[round % FEW_STAGES], problem.k, problem.k_stride,
                                   share.first_key(round), share.end, lane);
      copy_tile<D, FEW_KEYS, WARP>(pipeline.v[round % FEW_STAGES], problem.v, problem.v_stride,
                                   share.first_key(round), share.end, lane);
    }
    close_copy_group();  // an empty one too: groups are counted
  };
  for (int round = 0; round < FEW_STAGES - 1; ++round) copy(round);

  const Queries<D> q = load_queries<D, T>({problem.query(g), problem.query(g + 8)}, t);
  const float scale = a.scale * LOG2_E;
  Softmax softmax;
  float o[D / 8][4] = {};
  for (int round = 0; share.has(round); ++round) {
    wait_for_copies<FEW_STAGES - 2>();
    __syncwarp();  // other lanes' copies are here, and nobody reads the stage that is filled next
    copy(round + FEW_STAGES - 1);
    float scores[FEW_KEYS / 8][4];
    multiply_keys<T, D, FEW_KEYS>(scores, q, pipeline.k[round % FEW_STAGES], lane);
    scale_and_mask(scores, scale, share.first_key(round), limit, t);
    take_scores(softmax, scores, o);
    multiply_values<T, D, FEW_KEYS>(o, scores, pipeline.v[round % FEW_STAGES], lane);
  }
  finish(softmax);
  wait_for_copies<0>();
  merge_shares<T, D>(a, scratch, problem, shared.parts, shared.last, softmax, o,
                     [&](int n, int j) { return n * 8 + 2 * t + j; });
}

}  // namespace llama_fast::cuda
