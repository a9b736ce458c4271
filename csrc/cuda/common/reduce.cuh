// Sums over a warp and over a block.
#pragma once

#include <cuda_runtime.h>

namespace llama_fast::cuda {

constexpr unsigned WHOLE_WARP = 0xffffffffu;
constexpr int WARP = 32;

template <class S> __device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(WHOLE_WARP, x, distance);
  return x;
}

// Shared memory of block_sum. Two sets, used in turn: a thread may begin the next sum while others
// still read the last one.
template <class S, int COUNT> struct SumParts { S v[2][COUNT][WARP]; };

// Replaces each of the sums by its total over the threads of the row: blockDim.x of them, a multiple
// of 32. `turn` counts the calls within the kernel. With one warp to a row no thread waits for
// another warp; with more, blockDim.y is 1 and every thread of the block must call.
template <class S, int COUNT>
__device__ __forceinline__ void block_sum(S (&sums)[COUNT], SumParts<S, COUNT>& parts, int turn) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sums[i] = warp_sum(sums[i]);
  if (blockDim.x == WARP) return;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  auto& mine = parts.v[turn % 2];
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) mine[i][warp] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    sums[i] = warp_sum(lane < static_cast<int>(blockDim.x) / WARP ? mine[i][lane] : S(0));
}

}  // namespace llama_fast::cuda
