// Attention of few queries (decode): at most 16 rows to a KV head, so that time goes into reading keys
// and values, once. Dao et al., "Flash-Decoding" (2023).
//
// The keys of a KV head are split over blocks, and those of a block over its warps, 16 keys at a time.
// Each warp has a pipeline of its own: STAGES tiles of 16 keys and values are on their way by cp.async
// or in use, and no warp waits for another until all are done. Then the warps' results are merged in
// shared memory, and those of the blocks by the block that comes last, straight from the cache.
#pragma once

#include <common/overlap.cuh>

#include "problem.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace llama_fast::cuda {

constexpr int FEW_ROWS = 16, FEW_KEYS = 16, FEW_WARPS = 4, FEW_STAGES = 3;

// What one share of the keys leaves of a row: Σ weight · v with weights of 2^(score - max), and their
// sum.
template <int D> struct RowPart {
  float o[D];
  float max, sum;
};

template <class T, int D> struct FewQueriesShared {
  struct Pipeline { T k[FEW_STAGES][FEW_KEYS * D], v[FEW_STAGES][FEW_KEYS * D]; };
  union {
    Pipeline pipelines[FEW_WARPS];
    RowPart<D> parts[FEW_WARPS][FEW_ROWS];  // when the pipelines are done
  };
  bool last;
};

// Element d of a row from its `count` parts, `stride` of them apart, and the row's max and sum.
template <int D>
__device__ __forceinline__ float merged(const RowPart<D>* parts, int count, int64_t stride, int d,
                                        float& max, float& sum) {
  max = MINUS_INFINITY;
  for (int i = 0; i < count; ++i) max = fmaxf(max, parts[i * stride].max);
  const float base = base_of(max);
  float o = 0.0f;
  sum = 0.0f;
  for (int i = 0; i < count; ++i) {
    const RowPart<D>& part = parts[i * stride];
    const float factor = exp2_fast(part.max - base);
    o += part.o[d] * factor;
    sum += part.sum * factor;
  }
  return o;
}

template <class T, int D>
__global__ void __launch_bounds__(FEW_WARPS * WARP, 1)
attention_few_kernel(AttentionArgs a) {
  auto& shared = shared_memory<FewQueriesShared<T, D>>();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  wait_for_kernel_before();
  let_next_kernel_begin();
  // Only gridDim.x goes beyond 65,535: a batch may.
  const int b = blockIdx.x, kv = blockIdx.y, split = blockIdx.z, splits = gridDim.z;
  const Problem<T> problem(a, kv, b);
  const int limit[2] = {problem.limit(g), problem.limit(g + 8)};
  const int end = problem.limit(problem.rows() - 1);
  // This block's tiles, a whole number for each warp; the row's own length decides.
  const int tiles = (end + FEW_KEYS - 1) / FEW_KEYS;
  const int rounds = (tiles + splits * FEW_WARPS - 1) / (splits * FEW_WARPS);
  const auto first_key = [&](int round) {
    return ((split * rounds + round) * FEW_WARPS + warp) * FEW_KEYS;
  };

  auto& pipeline = shared.pipelines[warp];
  const auto copy = [&](int round) {
    if (round < rounds && first_key(round) < end) {
      copy_tile<D, FEW_KEYS, WARP>(pipeline.k[round % FEW_STAGES], problem.k, problem.k_stride,
                                   first_key(round), end, lane);
      copy_tile<D, FEW_KEYS, WARP>(pipeline.v[round % FEW_STAGES], problem.v, problem.v_stride,
                                   first_key(round), end, lane);
    }
    close_copy_group();  // an empty one too: groups are counted
  };
  for (int round = 0; round < FEW_STAGES - 1; ++round) copy(round);

  const Queries<D> q = load_queries<D, T>({problem.query(g), problem.query(g + 8)}, t);
  const float scale = a.scale * LOG2_E;
  Softmax softmax;
  float o[D / 8][4] = {};
  for (int round = 0; round < rounds && first_key(round) < end; ++round) {
    wait_for_copies<FEW_STAGES - 2>();
    __syncwarp();  // other lanes' copies are here, and nobody reads the stage that is filled next
    copy(round + FEW_STAGES - 1);
    float scores[FEW_KEYS / 8][4];
    multiply_keys<T, D, FEW_KEYS>(scores, q, pipeline.k[round % FEW_STAGES], lane);
    scale_and_mask(scores, scale, first_key(round), limit, t);
    take_scores(softmax, scores, o);
    multiply_values<T, D, FEW_KEYS>(o, scores, pipeline.v[round % FEW_STAGES], lane);
  }
  finish(softmax);
  wait_for_copies<0>();
  __syncthreads();  // all pipelines are done: their memory takes the parts
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    RowPart<D>& part = shared.parts[warp][g + 8 * i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) part.o[n * 8 + 2 * t + j] = o[n][2 * i + j];
    if (t == 0) {
      part.max = softmax.max[i];
      part.sum = softmax.sum[i];
    }
  }
  __syncthreads();

  const int rows = problem.rows();
  const int64_t head = int64_t(b) * gridDim.y + kv;
  auto* all_parts = static_cast<RowPart<D>*>(a.parts) + head * splits * rows;
  const auto write = [&](int r, int d, float value, float max, float sum) {
    static_cast<T*>(a.o)[problem.out_row(r, kv, b) * D + d] =
        from_float<T>(sum == 0.0f ? 0.0f : value / sum);
    if (a.lse && d == 0) a.lse[problem.lse_at(r, kv, b)] = log_sum(max, sum);
  };
  for (int i = threadIdx.x; i < rows * D; i += FEW_WARPS * WARP) {
    const int r = i / D, d = i % D;
    float max, sum;
    const float value = merged<D>(&shared.parts[0][r], FEW_WARPS, FEW_ROWS, d, max, sum);
    if (splits == 1) {
      write(r, d, value, max, sum);
    } else {
      RowPart<D>& part = all_parts[split * rows + r];
      part.o[d] = value;
      if (d == 0) {
        part.max = max;
        part.sum = sum;
      }
    }
  }
  if (splits == 1) return;

  __threadfence();  // the part is seen before the count
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(&a.arrived[head], 1) == splits - 1;
    if (shared.last) a.arrived[head] = 0;  // for the next call
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  for (int i = threadIdx.x; i < rows * D; i += FEW_WARPS * WARP) {
    const int r = i / D, d = i % D;
    float max, sum;
    const float value = merged<D>(all_parts + r, splits, rows, d, max, sum);
    write(r, d, value, max, sum);
  }
}

}  // namespace llama_fast::cuda
