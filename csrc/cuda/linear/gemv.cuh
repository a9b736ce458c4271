// Few rows of x times a transposed weight: y (M, C_out) = x Wᵀ, M <= 16; or, where W's rows are those of
// a gate and then those of `up`, y = swiglu(x W_gateᵀ, x W_upᵀ). linear*.cu launch it.
//
// What it costs is reading the weight, once; the products are left to the matrix instructions, whose
// rate is far above memory's. A block has 16 rows of the weight, the A of m16n8k16; 8 or 16 rows of x
// are its B. The block's warps share the columns, and add their sums up in shared memory at the end.
// Of a gated weight the 16 rows are 8 of the gate and the same 8 of `up`, so that a block has all that
// its outputs need, and each sum is made exactly as that of a plain product.
//
// The order of the products in a sum is free as long as A and B agree, so a lane takes 8 neighbouring
// columns, 8t … 8t + 7 of a step of 32, in one access each, and no element is moved between lanes:
// the first two pairs of them are the k = 2t, 2t+1, 2t+8, 2t+9 of one instruction, the others those of
// a second one.
#pragma once

#include <common/launch.cuh>
#include <common/pdl.cuh>
#include <common/ptx.cuh>

#include "../common/numeric.cuh"
#include "../common/reduce.cuh"
#include "../kernel_choice.h"
#include "../swiglu.cuh"

namespace llama_fast::cuda {

constexpr int WEIGHT_ROWS = 16;  // of a block
constexpr int WARPS = 8;
constexpr int STEP = 32;   // columns of two matrix instructions

// Eight elements as four registers, which is what both A and B take from a lane.
struct Pairs { uint32_t v[4]; };

__device__ __forceinline__ Pairs pairs(const uint4& bits) {
  return {{bits.x, bits.y, bits.z, bits.w}};
}

// sum += the products of 32 columns; rows g and g + 8 of the block's are `low` and `high`.
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

// Where the rows of x begin, in elements: worked out on the host, for it takes divisions. Behind the
// last one stands the first, which the tile reads in its place.
struct RowStarts { int64_t at[GEMV_ROWS]; };

inline RowStarts row_starts(const Rows& rows) {
  RowStarts starts = {};
  int m = 0;
  for (int64_t i0 = 0; i0 < rows.n0; ++i0)
    for (int64_t i1 = 0; i1 < rows.n1; ++i1)
      for (int64_t i2 = 0; i2 < rows.n2; ++i2)
        starts.at[m++] = i0 * rows.stride0 + i1 * rows.stride1 + i2 * rows.stride2;
  return starts;
}

// The sums of each warp: [tile of 8 rows of x][row of x][row of the weight].
template <int TILES> struct LinearShared { float sums[WARPS][TILES][8][WEIGHT_ROWS]; };

// The sum of row m of x with row `row` of the block's.
template <class T, int TILES>
__device__ __forceinline__ T total(const LinearShared<TILES>& shared, int m, int row) {
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += shared.sums[w][m / 8][m % 8][row];
  return from_float<T>(total);
}

// A Source is one kind of weight. It has
//     Raw         what a lane loads of a step
//     columns     how many there are
//     steps(TILES)    whose loads are under way together, as many as there are registers for
//     start(low, high)    the lane's two rows
//     load(c)     the lane's Raw of columns c … c + 7, for its rows; zeros behind the last column
//     multiply(sum, raw, x, c)    sum[TILES][4] += the products of a step with x[TILES]
// Rows of x and its columns are those of whole vectors: C_in is a multiple of 8.
template <class T, class Source, int TILES, bool GATED>
__global__ void __launch_bounds__(WARPS * WARP, 2)
linear_fwd_kernel(const T* x, const __grid_constant__ RowStarts x_starts, Source source, T* y,
                  int M, int64_t C_in, int64_t C_out) {
  constexpr int OUTPUTS = GATED ? WEIGHT_ROWS / 2 : WEIGHT_ROWS;  // of a block, for each row of x
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t(blockIdx.x) * OUTPUTS, last = C_out - 1;
  const int64_t low = min(first + g, last);  // a row that is none reads the last: nobody takes it
  source.start(low, GATED ? C_out + low : min(first + g + 8, last));
  const T* x_row[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) x_row[i] = x + x_starts.at[g + 8 * i];
  float sum[TILES][4] = {};
  constexpr int STEPS = Source::steps(TILES), CHUNK = STEPS * STEP;
  bool waited = false;
  for (int64_t c = warp * CHUNK + 8 * t; c - 8 * t < source.columns; c += WARPS * CHUNK) {
    typename Source::Raw raw[STEPS];
    Pairs of_x[STEPS][TILES];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) raw[s] = source.load(c + s * STEP);
    if (!waited) {  // the first weights are on their way; x is the kernel before's
      griddepcontrol_wait();
      waited = true;
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const int64_t at = c + s * STEP;
        of_x[s][i] = {};
        if (at < C_in) of_x[s][i] = pairs(*reinterpret_cast<const uint4*>(x_row[i] + at));
      }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) source.multiply(sum, raw[s], of_x[s], c + s * STEP);
  }
  if (!waited) griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  auto& shared = shared_memory<LinearShared<TILES>>();
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      shared.sums[warp][i][2 * t + j % 2][g + j / 2 * 8] = sum[i][j];
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * 8 * OUTPUTS; i += WARPS * WARP) {
    const int output = i % OUTPUTS, m = i / OUTPUTS;
    if (m >= M || first + output >= C_out) continue;
    T value = total<T>(shared, m, output);
    if constexpr (GATED) value = swiglu_of(value, total<T>(shared, m, output + OUTPUTS));
    y[m * C_out + first + output] = value;
  }
}

// C_out is the number of outputs; a gated weight has twice as many rows.
template <class T, bool GATED, class Source>
void launch_linear(const Target& target, const char* name, const void* x, const Rows& x_rows,
                   const Source& source, void* y, int64_t C_in, int64_t C_out) {
  const int M = static_cast<int>(x_rows.count());
  if (M == 0 || C_out == 0) return;
  const auto run = [&](auto kernel, size_t shared_bytes) {
    const Launch how{name,
                     {unsigned(ceil_div(C_out, GATED ? WEIGHT_ROWS / 2 : WEIGHT_ROWS))},
                     {WARPS * WARP},
                     shared_bytes,
                     true};
    launch(target, how, kernel, static_cast<const T*>(x), row_starts(x_rows), source,
           static_cast<T*>(y), M, C_in, C_out);
  };
  if (M <= 8) run(linear_fwd_kernel<T, Source, 1, GATED>, sizeof(LinearShared<1>));
  else run(linear_fwd_kernel<T, Source, 2, GATED>, sizeof(LinearShared<2>));
}

}  // namespace llama_fast::cuda
