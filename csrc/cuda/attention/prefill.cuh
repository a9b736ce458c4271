// Prefill (and training), for sm_80 and later. Dao, "FlashAttention-2" (2023).
//
// A block has 16 rows for each warp, as many queries as a GPU's registers hold, and walks over the keys
// in tiles of 64: while one is multiplied, cp.async brings the next. Scores never leave the registers.
// Blocks that see the most keys come first, those of all heads side by side.
#pragma once

#include "output.cuh"
#include "problem.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace llama_fast::cuda {

constexpr int TILE = 64;  // keys

template <class T, int D> struct PrefillShared { T k[2][TILE * D], v[2][TILE * D]; };

template <class T, int D, int WARPS>
__global__ void __launch_bounds__(WARPS * WARP, 1)
attention_prefill_kernel(AttentionArgs a) {
  constexpr int ROWS = WARPS * 16, THREADS = WARPS * WARP;
  auto& shared = shared_memory<PrefillShared<T, D>>();
  const int thread = threadIdx.x, lane = thread % WARP, g = lane / 4, t = lane % 4;
  const int kv = blockIdx.x, b = blockIdx.z;
  const Problem<T> problem(a, kv, b);
  const int block_row = int(gridDim.y - 1 - blockIdx.y) * ROWS;
  // A document may be shorter than the row whose tiles the grid has.
  if (a.cu_seqlens && block_row >= problem.rows()) return;
  const int row[2] = {block_row + thread / WARP * 16 + g, block_row + thread / WARP * 16 + g + 8};
  const int limit[2] = {problem.limit(row[0]), problem.limit(row[1])};
  const int end = problem.limit(min(block_row + ROWS, problem.rows()) - 1);
  const auto copy = [&](int stage, int first) {
    copy_tile<D, TILE, THREADS>(shared.k[stage], problem.k, problem.k_stride, first, end, thread);
    copy_tile<D, TILE, THREADS>(shared.v[stage], problem.v, problem.v_stride, first, end, thread);
    cp_async_commit();
  };

  const Queries<D> q = load_queries<D, T>({problem.query(row[0]), problem.query(row[1])}, t);
  Softmax softmax;
  float o[D / 8][4] = {};
  if (end > 0) copy(0, 0);
  for (int first = 0, stage = 0; first < end; first += TILE, stage ^= 1) {
    if (first + TILE < end) {
      copy(stage ^ 1, first + TILE);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    float scores[TILE / 8][4];
    multiply_keys<T, D, TILE>(scores, q, shared.k[stage], lane);
    scale_and_mask(scores, a.scale.unit, first, limit, t);
    take_scores(softmax, scores, a.scale.rest, o);
    multiply_values<T, D, TILE>(o, scores, shared.v[stage], lane);
    __syncthreads();  // the next copy overwrites this stage
  }
  finish(softmax);
  write_rows<T, D>(a, problem, kv, b, row, softmax, o, t);
}

}  // namespace llama_fast::cuda
