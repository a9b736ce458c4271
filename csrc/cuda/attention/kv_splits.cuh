// Decode, with keys that are split over blocks and the warps of a block: which keys a warp has, what it
// leaves of each row, and how that becomes the output.
#pragma once

#include <common/launch.cuh>

#include "../common/numeric.cuh"
#include "../kernel_choice.h"
#include "problem.cuh"
#include "softmax.cuh"

namespace llama_fast::cuda {

constexpr int DECODE_WARPS = 4;

// The tiles of KEYS keys of a warp: a whole number of rounds, in each of which every warp of a block has
// one. The keys that the last row sees are split, so the row's own length decides.
template <int KEYS> struct Split {
  int end, rounds, first;

  __device__ __forceinline__ Split(int end, int split, int splits, int warp) : end(end) {
    const int tiles = (end + KEYS - 1) / KEYS;
    rounds = (tiles + splits * DECODE_WARPS - 1) / (splits * DECODE_WARPS);
    first = (split * rounds * DECODE_WARPS + warp) * KEYS;
  }

  __device__ __forceinline__ int first_key(int round) const {
    return first + round * DECODE_WARPS * KEYS;
  }
  __device__ __forceinline__ bool has(int round) const {
    return round < rounds && first_key(round) < end;
  }
};

// What a split of the keys leaves of a row: Σ weight · v with weights of 2^((score - m) · rest), and their
// sum.
template <int D> struct Partial {
  float o[D];
  float m, l;
};

// Element d of a row from its `count` partials, `stride` of them apart, and the row's m and l.
template <int D>
__device__ __forceinline__ float merge_state(const Partial<D>* partials, int count, int64_t stride,
                                             int d, float rest, float& m, float& l) {
  m = MINUS_INFINITY;
  for (int i = 0; i < count; ++i) m = fmaxf(m, partials[i * stride].m);
  const float base = base_of(m);
  float o = 0.0f;
  l = 0.0f;
  for (int i = 0; i < count; ++i) {
    const Partial<D>& part = partials[i * stride];
    const float factor = exp2_fast((part.m - base) * rest);
    o += part.o[d] * factor;
    l += part.l * factor;
  }
  return o;
}

// The output from what each warp has in registers: o[n] and column(n, j) of row g + 8i in o[n][2i + j].
// The block's warps are merged in shared memory, where `partials` take the place of what the block has
// multiplied, and blocks by the one that comes last, straight from the cache.
template <class T, int D, class Cached, class Column>
__device__ __forceinline__ void merge_splits(const AttentionArgs& a, const AttentionScratch& scratch,
                                             const Problem<T, Cached>& problem,
                                             Partial<D> (&partials)[DECODE_WARPS][DECODE_ROWS], bool& last,
                                             const Softmax& softmax, const float (&o)[D / 8][4],
                                             Column column) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int b = blockIdx.x, kv = blockIdx.y, split = blockIdx.z, splits = gridDim.z;
  __syncthreads();  // all warps are done with the memory that takes the partials
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Partial<D>& part = partials[warp][g + 8 * i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) part.o[column(n, j)] = o[n][2 * i + j];
    if (t == 0) {
      part.m = softmax.m[i];
      part.l = softmax.l[i];
    }
  }
  __syncthreads();

  const int rows = problem.rows();
  const int64_t head = int64_t(b) * gridDim.y + kv;
  auto* all_partials = static_cast<Partial<D>*>(scratch.partials) + head * splits * rows;
  const auto write = [&](int r, int d, float value, float max, float sum) {
    static_cast<T*>(a.o)[problem.out_row(r, kv) * D + d] =
        from_float<T>(sum == 0.0f ? 0.0f : value / sum);
    if (a.lse && d == 0) static_cast<float*>(a.lse)[problem.lse_at(r, kv)] =
          log_sum(max, sum, a.scale);
  };
  for (int i = threadIdx.x; i < rows * D; i += DECODE_WARPS * WARP) {
    const int r = i / D, d = i % D;
    float max, sum;
    const float value = merge_state<D>(&partials[0][r], DECODE_WARPS, DECODE_ROWS, d, a.scale.rest, max,
                                       sum);
    if (splits == 1) {
      write(r, d, value, max, sum);
    } else {
      Partial<D>& part = all_partials[split * rows + r];
      part.o[d] = value;
      if (d == 0) {
        part.m = max;
        part.l = sum;
      }
    }
  }
  if (splits == 1) return;

  __threadfence();  // the part is seen before the count
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&scratch.arrived[head], 1) == splits - 1;
    if (last) scratch.arrived[head] = 0;  // for the next call
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = threadIdx.x; i < rows * D; i += DECODE_WARPS * WARP) {
    const int r = i / D, d = i % D;
    float max, sum;
    const float value = merge_state<D>(all_partials + r, splits, rows, d, a.scale.rest, max, sum);
    write(r, d, value, max, sum);
  }
}

// ---- on the host ----

// Every architecture that is served has this much for a block: sm_86, 89 and 120 have no more.
constexpr size_t MOST_SHARED = 99 * 1024;

template <class Shared>
Launch decode_launch(const char* kernel, const AttentionArgs& a, int64_t splits) {
  static_assert(sizeof(Shared) <= MOST_SHARED, "fits every GPU");
  return {kernel,
          {unsigned(a.B), unsigned(a.K), unsigned(splits)},
          {DECODE_WARPS * WARP},
          sizeof(Shared),
          true};
}

}  // namespace llama_fast::cuda
