// Tiles of keys and values in shared memory, and their products with matrices in registers.
//
// A tile is rows of D elements. Its 16-byte chunks are swizzled, chunk c of row r lying at c ^ (r % 8),
// so that the eight rows that ldmatrix reads at once are in different banks.
#pragma once

#include <common/launch.cuh>
#include <common/ptx.cuh>

#include "../common/numeric.cuh"
#include "../common/reduce.cuh"

namespace llama_fast::cuda {

template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * D + (chunk ^ (row % 8)) * 8;
}

// Starts the copy of ROWS rows from `first` on by THREADS threads; zeros for rows from `end` on, which
// are not read.
template <int D, int ROWS, int THREADS, class T>
__device__ __forceinline__ void copy_tile(T* tile, const T* source, int64_t stride, int first,
                                          int end, int thread) {
  constexpr int CHUNKS = D / 8;             // of a row
  constexpr int STEP = THREADS / CHUNKS;  // rows that are copied together
  const int chunk = thread % CHUNKS;
  int row = thread / CHUNKS;
  source += (first + row) * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i, row += STEP, source += STEP * stride)
    copy_async(tile + swizzled<D>(row, chunk), source, first + row < end);
}

// The 16 rows of q of a warp as the A of its products: 4 registers for each 16 columns.
template <int D> struct Queries { uint32_t v[D / 16][4]; };

// `row[i]` is row g + 8i of the warp's, or null for zeros.
template <int D, class T>
__device__ __forceinline__ Queries<D> load_queries(const T* const (&row)[2], int t) {
  Queries<D> q;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Not by memcpy, to which a T may stand at any even address: it would load single bytes.
      const T* pair = row[j % 2] + k * 16 + j / 2 * 8 + 2 * t;
      q.v[k][j] = row[j % 2] ? *reinterpret_cast<const uint32_t*>(pair) : 0;
    }
  return q;
}

// scores (16, KEYS) = q · kᵀ, as C of the matrix instruction: eight keys to each four registers.
template <class T, int D, int KEYS>
__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 8][4], const Queries<D>& q,
                                              const T* tile, int lane) {
#pragma unroll
  for (int n = 0; n < KEYS / 16; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[2 * n][j] = scores[2 * n + 1][j] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];  // keys 0 … 7: columns 0 … 7, 8 … 15; keys 8 … 15: the same
      ldmatrix(b, tile + swizzled<D>(n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      mma_16x8x16<T>(scores[2 * n], q.v[k], {b[0], b[1]});
      mma_16x8x16<T>(scores[2 * n + 1], q.v[k], {b[2], b[3]});
    }
  }
}

// o (16, D) += weights · v, the weights as multiply_keys left the scores.
template <class T, int D, int KEYS>
__device__ __forceinline__ void multiply_values(float (&o)[D / 8][4],
                                                const float (&weights)[KEYS / 8][4],
                                                const T* tile, int lane) {
#pragma unroll
  for (int k = 0; k < KEYS / 16; ++k) {
    const float(&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];  // columns 0 … 7: keys 0 … 7, 8 … 15; columns 8 … 15: the same
      ldmatrix_transposed(
          b, tile + swizzled<D>(k * 16 + lane / 8 % 2 * 8 + lane % 8, n * 2 + lane / 16));
      mma_16x8x16<T>(o[2 * n], a, {b[0], b[1]});
      mma_16x8x16<T>(o[2 * n + 1], a, {b[2], b[3]});
    }
  }
}

}  // namespace llama_fast::cuda
