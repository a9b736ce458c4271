// Few queries against keys that blocks share, and the warps of a block: which keys a warp has, what it
// leaves of each row, and how that becomes the output.
#pragma once

#include <common/launch.cuh>

#include "../common/numeric.cuh"
#include "problem.cuh"
#include "softmax.cuh"

namespace llama_fast::cuda {

constexpr int FEW_ROWS = 16, FEW_WARPS = 4;

// The tiles of KEYS keys of a warp: a whole number of rounds, in each of which every warp of a block has
// one. The keys that the last row sees are split, so the row's own length decides.
template <int KEYS> struct Share {
  int end, rounds, first;

  __device__ __forceinline__ Share(int end, int split, int splits, int warp) : end(end) {
    const int tiles = (end + KEYS - 1) / KEYS;
    rounds = (tiles + splits * FEW_WARPS - 1) / (splits * FEW_WARPS);
    first = (split * rounds * FEW_WARPS + warp) * KEYS;
  }

  __device__ __forceinline__ int first_key(int round) const {
    return first + round * FEW_WARPS * KEYS;
  }
  __device__ __forceinline__ bool has(int round) const {
    return round < rounds && first_key(round) < end;
  }
};

// What one share of the keys leaves of a row: Σ weight · v with weights of 2^(score - max), and their
// sum.
template <int D> struct RowPart {
  float o[D];
  float max, sum;
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

// The output from what each warp has in registers: o[n] and column(n, j) of row g + 8i in o[n][2i + j].
// The block's warps are merged in shared memory, where `parts` take the place of what the block has
// multiplied, and blocks by the one that comes last, straight from the cache.
template <class T, int D, class Cached, class Column>
__device__ __forceinline__ void merge_shares(const AttentionArgs& a, const AttentionScratch& scratch,
                                             const Problem<T, Cached>& problem,
                                             RowPart<D> (&parts)[FEW_WARPS][FEW_ROWS], bool& last,
                                             const Softmax& softmax, const float (&o)[D / 8][4],
                                             Column column) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int b = blockIdx.x, kv = blockIdx.y, split = blockIdx.z, splits = gridDim.z;
  __syncthreads();  // all warps are done with the memory that takes the parts
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    RowPart<D>& part = parts[warp][g + 8 * i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) part.o[column(n, j)] = o[n][2 * i + j];
    if (t == 0) {
      part.max = softmax.max[i];
      part.sum = softmax.sum[i];
    }
  }
  __syncthreads();

  const int rows = problem.rows();
  const int64_t head = int64_t(b) * gridDim.y + kv;
  auto* all_parts = static_cast<RowPart<D>*>(scratch.partials) + head * splits * rows;
  const auto write = [&](int r, int d, float value, float max, float sum) {
    static_cast<T*>(a.o)[problem.out_row(r, kv, b) * D + d] =
        from_float<T>(sum == 0.0f ? 0.0f : value / sum);
    if (a.lse && d == 0) static_cast<float*>(a.lse)[problem.lse_at(r, kv, b)] = log_sum(max, sum);
  };
  for (int i = threadIdx.x; i < rows * D; i += FEW_WARPS * WARP) {
    const int r = i / D, d = i % D;
    float max, sum;
    const float value = merged<D>(&parts[0][r], FEW_WARPS, FEW_ROWS, d, max, sum);
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
    last = atomicAdd(&scratch.arrived[head], 1) == splits - 1;
    if (last) scratch.arrived[head] = 0;  // for the next call
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = threadIdx.x; i < rows * D; i += FEW_WARPS * WARP) {
    const int r = i / D, d = i % D;
    float max, sum;
    const float value = merged<D>(all_parts + r, splits, rows, d, max, sum);
    write(r, d, value, max, sum);
  }
}

// ---- on the host ----

// Every architecture that is served has this much for a block: sm_86, 89 and 120 have no more.
constexpr size_t MOST_SHARED = 99 * 1024;

template <class Shared>
Launch launch_of_few(const char* kernel, const AttentionArgs& a, int64_t splits) {
  static_assert(sizeof(Shared) <= MOST_SHARED, "fits every GPU");
  return {kernel,
          {unsigned(a.B), unsigned(a.K), unsigned(splits)},
          {FEW_WARPS * WARP},
          sizeof(Shared),
          true};
}

}  // namespace llama_fast::cuda
