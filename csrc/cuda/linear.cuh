// Few rows of x times a transposed weight: y (M, C_out) = x Wᵀ, M <= 16. linear.cu and
// linear_quantized.cu launch it.
//
// What it costs is reading the weight, once; the products are left to the matrix instructions, whose
// rate is far above memory's. A block has 16 rows of the weight, the A of m16n8k16; 8 or 16 rows of x
// are its B. The block's warps share the columns, and add their sums up in shared memory at the end.
//
// The order of the products in a sum is free as long as A and B agree, so a lane takes 8 neighbouring
// columns, 8t … 8t + 7 of a step of 32, in one access each, and no element is moved between lanes:
// the first two pairs of them are the k = 2t, 2t+1, 2t+8, 2t+9 of one instruction, the others those of
// a second one.
#pragma once

#include <common/launch.cuh>
#include <common/overlap.cuh>
#include <common/ptx.cuh>

#include "common/numeric.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace llama_fast::cuda {

constexpr int MOST_ROWS = 16;   // of x
constexpr int WEIGHT_ROWS = 16;  // of a block
constexpr int WARPS = 8;
constexpr int STEP = 32;   // columns of two matrix instructions

// Eight elements as four registers, which is what both A and B take from a lane.
struct Pairs { uint32_t v[4]; };

// The columns c … c + 7 of a row; zeros where they are not below `columns` or the row is none.
// `wide`: the row is aligned to 16 bytes and `columns` a multiple of 8. A weight is read once and
// leaves the cache to x.
template <bool STREAM, class T>
__device__ __forceinline__ Pairs load_columns(const T* row, int64_t c, int64_t columns, bool wide,
                                              bool valid) {
  Pairs pairs = {};
  if (wide) {
    if (valid && c < columns) {
      const uint4 bits = STREAM ? load_once(row + c) : *reinterpret_cast<const uint4*>(row + c);
      memcpy(&pairs, &bits, sizeof pairs);
    }
  } else if (valid) {
    T elements[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      elements[i] = c + i < columns ? row[c + i] : from_float<T>(0.0f);
    memcpy(&pairs, static_cast<const void*>(elements), sizeof pairs);
  }
  return pairs;
}

// sum += the products of 32 columns; rows g and g + 8 of the weight are `low` and `high`.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const Pairs& low, const Pairs& high,
                                         const Pairs& x) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t a[4] = {low.v[i], high.v[i], low.v[i + 1], high.v[i + 1]};
    const uint32_t b[2] = {x.v[i], x.v[i + 1]};
    mma_16x8x16<T>(sum, a, b);
  }
}

// The sums of each warp: [tile of 8 rows of x][row of x][row of the weight].
template <int TILES> struct LinearShared { float sums[WARPS][TILES][8][WEIGHT_ROWS]; };

// A Source is one kind of weight. It has
//     Raw         what a lane loads of a step
//     columns     how many there are
//     steps(TILES)    whose loads are under way together, as many as there are registers for
//     load(c)     the lane's Raw of columns c … c + 7, for its rows; zeros behind the last column
//     multiply(sum, raw, x, c)    sum[TILES][4] += the products of a step with x[TILES]
template <class T, class Source, int TILES>
__global__ void __launch_bounds__(WARPS * WARP, 2)
linear_fwd_kernel(const T* x, Rows x_rows, Source source, T* y, int M, int64_t C_in, int64_t C_out,
                  bool wide) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int64_t first_row = int64_t(blockIdx.x) * WEIGHT_ROWS;
  source.start(first_row, g);
  const T* x_row[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i)
    x_row[i] = g + 8 * i < M ? x + offset(x_rows, g + 8 * i) : nullptr;
  float sum[TILES][4] = {};
  constexpr int STEPS = Source::steps(TILES), CHUNK = STEPS * STEP;
  bool waited = false;
  for (int64_t c = warp * CHUNK + 8 * t; c - 8 * t < source.columns; c += WARPS * CHUNK) {
    typename Source::Raw raw[STEPS];
    Pairs of_x[STEPS][TILES];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) raw[s] = source.load(c + s * STEP);
    if (!waited) {  // the first weights are on their way; x is the kernel before's
      wait_for_kernel_before();
      waited = true;
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        of_x[s][i] = load_columns<false>(x_row[i], c + s * STEP, C_in, wide, x_row[i] != nullptr);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) source.multiply(sum, raw[s], of_x[s], c + s * STEP);
  }
  if (!waited) wait_for_kernel_before();
  let_next_kernel_begin();
  auto& shared = shared_memory<LinearShared<TILES>>();
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      shared.sums[warp][i][2 * t + j % 2][g + j / 2 * 8] = sum[i][j];
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * 8 * WEIGHT_ROWS; i += WARPS * WARP) {
    const int row = i % WEIGHT_ROWS, m = i / WEIGHT_ROWS;
    if (m >= M || first_row + row >= C_out) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += shared.sums[w][m / 8][m % 8][row];
    y[m * C_out + first_row + row] = from_float<T>(total);
  }
}

template <class T, class Source>
void launch_linear(const Target& target, const char* name, const void* x, const Rows& x_rows,
                   const Source& source, void* y, int64_t C_in, int64_t C_out) {
  const int M = static_cast<int>(x_rows.count());
  if (M == 0 || C_out == 0) return;
  const bool wide = C_in % 8 == 0 && whole(8, x_rows) && aligned({x}) && source.aligned_columns;
  const auto run = [&](auto kernel, size_t shared_bytes) {
    const Launch how{name, {unsigned(ceil_div(C_out, WEIGHT_ROWS))}, {WARPS * WARP}, shared_bytes,
                     true};
    launch(target, how, kernel, static_cast<const T*>(x), x_rows, source, static_cast<T*>(y), M,
           C_in, C_out, wide);
  };
  if (M <= 8) run(linear_fwd_kernel<T, Source, 1>, sizeof(LinearShared<1>));
  else run(linear_fwd_kernel<T, Source, 2>, sizeof(LinearShared<2>));
}

}  // namespace llama_fast::cuda
