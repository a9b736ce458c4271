// Small matrix products of attention's tiles, and what packs their right sides.
//
// A product has its left side in units of T, one of which meets a vector of the right side's panel at
// a time, and as many sums in registers as rows and vectors of the panel.
#pragma once

#include <algorithm>

#include "../simd/amx.h"
#include "softmax.h"

namespace llama_fast {
namespace ISA {

// Σ over `steps` units of a[r] · b for ROWS rows of a and a panel of N vectors of b, given to
// put(r, i, sums). DOWN: the units of a row lie a_stride apart, and the rows side by side.
template <class T, int ROWS, int N, bool DOWN = false, class Put>
static inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t steps,
                            Put&& put) {
  constexpr int W = vf::W;
  vf total[ROWS][N];
  for (auto& row : total)
    for (vf& t : row) t = zero();
  for (int64_t step = 0; step < steps; ++step) {
    vf x[N];
    for (int i = 0; i < N; ++i) x[i] = load(b + (step * N + i) * W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf y = keep(set(DOWN ? a[step * a_stride + r] : a[r * a_stride + step]));
      for (int i = 0; i < N; ++i) total[r][i] = Unit<T>::madd(y, x[i], total[r][i]);
    }
  }
  // Without the pragmas GCC 12 takes the sums out of the registers for these loops.
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) put(r, i, total[r][i]);
  }
}

// The same place in the next tile of keys or values, where tile registers leave no time to wait for it.
template <class T> static inline void fetch_next_tile(const T* p, int64_t stride) {
  if constexpr (BY_TILES<T>) __builtin_prefetch(p + TILE * stride, 0, 2);
}

// Keys (count, D) → panels of PANEL keys, each (units, PANEL), by default of D / unit units; zeros fill the
// last ones, and the last panel.
template <class T, int PANEL>
static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t D, float* packed,
                      int64_t units = 0) {
  constexpr int W = vf::W, SIZE = Unit<T>::size;
  const int64_t filled = D / SIZE;
  units = std::max(units, filled);
  for (int64_t j = 0; j < round_up(count, PANEL); j += W) {
    float* panel = packed + j / PANEL * PANEL * units + j % PANEL;
    for (int64_t u = 0; u < units; u += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) {
        const T* from = k + (j + i) * stride + u * SIZE;
        fetch_next_tile(from, stride);
        x[i] = j + i >= count ? zero()
               : u + W <= filled ? Unit<T>::load(from, Full{})
                                : Unit<T>::load(from, int(D - u * SIZE));
      }
      transpose(x);
      for (int i = 0; i < W && u + i < units; ++i) store(panel + (u + i) * PANEL, x[i]);
    }
  }
}

// Values (count, D) → panels of up to PANEL columns, each (steps, columns), by default of count / unit
// steps; zeros fill the last ones.
template <class T, int PANEL>
static void pack_values(const T* v, int64_t stride, int64_t count, int64_t D, float* packed,
                        int64_t steps = 0) {
  constexpr int W = vf::W, SIZE = Unit<T>::size;
  const int64_t columns = round_up(D, W), filled = (count + SIZE - 1) / SIZE;
  steps = std::max(steps, filled);
  for (int64_t step = 0; step < steps; ++step) {
    auto put = [&](int64_t d, vf x) {  // d is a multiple of W
      if (d >= columns) return;
      const int64_t begin = d / PANEL * PANEL, width = std::min<int64_t>(PANEL, columns - begin);
      store(packed + begin * steps + step * width + (d - begin), x);
    };
    if (step >= filled) {
      for (int64_t d = 0; d < columns; d += W) put(d, zero());
      continue;
    }
    const T* row = v + step * SIZE * stride;
    if constexpr (SIZE == 1) {
      for_each_vector(D, [&](int64_t d, auto width) { put(d, load(row + d, width)); });
    } else {
      const T* next = step * 2 + 1 < count ? row + stride : nullptr;
      for (int64_t d = 0; d < D; d += 2 * W) {
        fetch_next_tile(row + d, stride);
        fetch_next_tile(next + d, stride);
        vf x[2];
        Unit<T>::pair(row + d, next ? next + d : nullptr, int(std::min<int64_t>(2 * W, D - d)), x);
        put(d, x[0]);
        put(d + W, x[1]);
      }
    }
  }
}

}  // namespace ISA
}  // namespace llama_fast
