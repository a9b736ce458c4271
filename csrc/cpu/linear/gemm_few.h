// GEMM of few lanes: `linear` of few rows of x, where their bits may not depend on how many they are
// (GEMV, which is faster still, adds in an order of its own). Limited by reading W, as GEMV is.
//
// The sides change places: vectors of W's rows become the lanes of the registers, turned as they come
// from memory, and x's units are broadcast. A piece of some steps is turned into L1, where it meets
// all rows of x; W's next span comes from memory meanwhile, in the order of its addresses.
//
// Each sum has GEMM's order: unit by unit along a chunk, then chunk after chunk.
#pragma once

#include <algorithm>

#include "../parallel.h"
#include "../scratch.h"
#include "pack.h"

namespace llama_fast {
namespace ISA {

template <class T> class FewLanes {
 public:
  static bool takes(const GemmArgs& a) {
    return a.L <= MOST_LANES && a.out_transposed && !a.rows.transposed && !a.lanes.transposed;
  }

  explicit FewLanes(const GemmArgs& a)
      : a_(a), rows_{a.rows, a.K}, stride_(ceil_div(a.K, STEP) * STEP_UNITS) {}

  void run() {
    x_ = scratch<FewLanes>(stride_ * a_.L);
    Side<T>{a_.lanes, a_.K}.pack_rows(0, int(a_.L), 0, a_.K, x_, {stride_, STEP_UNITS});
    const int64_t vectors = ceil_div(a_.R, W);
    const int64_t grain = ceil_div(product_grain(a_.R, a_.K * a_.L), W);
    parallel_for(vectors, grain, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * W, a_.R);
      for (int64_t r = begin * W; r < last; r += 2 * W) {
        const int64_t n = std::min<int64_t>(2 * W, last - r);
        if (n > W) multiply_rows<2>(r, n, last);
        else multiply_rows<1>(r, n, last);
      }
    });
  }

 private:
  using D = Dot<T>;
  static constexpr int W = vf::W, STEP = D::STEP, STEP_UNITS = Side<T>::STEP_UNITS;
  static constexpr int64_t MOST_LANES = GEMV_ROWS_BESIDE_GEMM;
  static constexpr int64_t CHUNK = CHUNK_UNITS / STEP_UNITS * STEP;      // elements of K
  static constexpr int64_t PIECE = std::min<int64_t>(4 * STEP, CHUNK);  // in L1: up to 16 KB
  static constexpr int64_t SPAN = 4096 / sizeof(T);  // of a row that is fetched together

  // n rows of W, in V vectors; the thread's own end before `last`.
  template <int V> void multiply_rows(int64_t r, int64_t n, int64_t last) const {
    const T* from[V][W];
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < W; ++i) from[v][i] = rows_.vector(r + std::min<int64_t>(v * W + i, n - 1));
    alignas(64) float piece[PIECE / STEP * STEP_UNITS * V * W];
    vf sums[MOST_LANES * V], total[MOST_LANES * V];
    const int64_t count = a_.L * V;
    LinesAhead ahead;
    for (int64_t k = 0; k < a_.K; k += PIECE) {
      const int64_t end = std::min(k + PIECE, a_.K);
      if (k % SPAN == 0) ahead = after_span(r, n, last, k);
      if (k % CHUNK == 0) std::fill(sums, sums + count, zero());
      float* to = piece;
      for (int64_t step = k; step < end; step += STEP, to += STEP_UNITS * V * W) {
        ahead.step();
        for (int v = 0; v < V; ++v) rows_.pack_lanes(from[v], step, to + v * W, V * W);
      }
      multiply_piece<V>(piece, x_ + k / STEP * STEP_UNITS, (to - piece) / (V * W), sums);
      if (end % CHUNK == 0 || end == a_.K)
        for (int64_t i = 0; i < count; ++i) total[i] = k < CHUNK ? sums[i] : total[i] + sums[i];
    }
    T* out = static_cast<T*>(a_.out) + r;
    for (int64_t l = 0; l < a_.L; ++l, out += a_.R)
      for (int v = 0; v < V; ++v) {
        const int m = int(std::min<int64_t>(n - v * W, W));
        if (m == W) store(out + v * W, total[l * V + v]);
        else store(out + v * W, total[l * V + v], m);
      }
  }

  // What comes behind the span of n rows at k: the next of these rows, or the first of the next ones.
  LinesAhead after_span(int64_t r, int64_t n, int64_t last, int64_t k) const {
    const int64_t steps = ceil_div(std::min(SPAN, a_.K - k), STEP);
    const int64_t next = k + SPAN;
    if (next < a_.K) return rows_.ahead(r, n, next, std::min(next + SPAN, a_.K), steps);
    return rows_.ahead(r + n, std::min(n, last - r - n), 0, std::min(SPAN, a_.K), steps);
  }

  template <int V>
  void multiply_piece(const float* piece, const float* x, int64_t units, vf* sums) const {
    const int64_t groups = ceil_div(a_.L, BROADCAST_ROWS);  // as even as can be
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t l = a_.L * i / groups, end = a_.L * (i + 1) / groups;
      multiply_tile<V>(int(end - l), piece, x + l * stride_, units, sums + l * V);
    }
  }

  template <int V, int L = BROADCAST_ROWS>
  void multiply_tile(int lanes, const float* piece, const float* x, int64_t units, vf* sums) const {
    if constexpr (L > 1) {
      if (lanes < L) return multiply_tile<V, L - 1>(lanes, piece, x, units, sums);
    }
    vf acc[L][V];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < V; ++v) acc[l][v] = sums[l * V + v];
    for (int64_t u = 0; u < units; ++u, piece += V * W) {
      vf w[V];
      for (int v = 0; v < V; ++v) w[v] = load(piece + v * W);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const vf xl = keep(set(x[l * stride_ + u]));
        for (int v = 0; v < V; ++v) acc[l][v] = D::add(w[v], xl, acc[l][v]);
      }
    }
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < V; ++v) sums[l * V + v] = acc[l][v];
  }

  const GemmArgs& a_;
  Side<T> rows_;
  int64_t stride_;     // of a row of x, in units
  float* x_ = nullptr;  // packed
};

}  // namespace ISA
}  // namespace llama_fast
