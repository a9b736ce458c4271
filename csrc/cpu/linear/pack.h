// What a GEMM does besides multiplying: both sides become units of 4 bytes, floats or pairs of bf16,
// where the inner loop takes them; and sums become the result.
#pragma once

#include <algorithm>
#include <cstring>

#include "../../args.h"
#include "../simd/dot.h"
#include "ahead.h"
#include "quantized_weight.h"

namespace llama_fast {
namespace ISA {

static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Units of K whose products are added up before they join a sum: of a panel 32 KB, or 16 on AVX2. A
// scalar build needs short chunks for exactness.
constexpr int64_t CHUNK_UNITS = vf::W == 1 ? 32 : 256;
// Vectors whose units are broadcast, to meet two vectors of the other side's in registers.
constexpr int BROADCAST_ROWS = vf::W == 16 ? 12 : vf::W == 8 ? 6 : 4;

// Where packed rows lie, in units: row i at i · row, each step of it `step` behind the one before.
struct RowStrides { int64_t row, step; };

// A side of the product: `count` vectors of K elements each, of which this packs.
template <class T> struct Side {
  using D = Dot<T>;
  static constexpr int STEP_UNITS = D::PARTS * vf::W;  // units of STEP elements
  const MatrixSide& m;
  int64_t K;

  const T* vector(int64_t i) const { return static_cast<const T*>(m.data) + m.rows.offset(i); }

  // To fetch elements k_begin to k_end of n vectors from `first` on, in so many steps of computing.
  // Vectors that run down the memory are left to the hardware.
  LinesAhead ahead(int64_t first, int64_t n, int64_t k_begin, int64_t k_end, int64_t steps) const {
    if (m.transposed || n <= 0 || k_begin >= k_end) return {};
    return {vector(first) + k_begin, n, ceil_div((k_end - k_begin) * int64_t(sizeof(T)), 64),
            m.rows.stride2 * int64_t(sizeof(T)), steps};
  }

  // The STEP elements of a vector from k on, in a buffer with zeros where they end.
  const T* step(const T* vector, int64_t k, T (&buffer)[D::STEP]) const {
    if (k + D::STEP <= K) return vector + k;
    std::memset(buffer, 0, sizeof(buffer));
    std::memcpy(buffer, vector + k, size_t(K - k) * sizeof(T));
    return buffer;
  }

  // Where a vector runs down the memory: unit `unit` of the step at k, of `n` vectors from `first`.
  vf unit(int64_t k, int unit, int64_t first, int n) const {
    const int64_t at_k = k + D::element(unit);
    auto load_at = [&](int64_t i) {
      const T* p = static_cast<const T*>(m.data) + i * m.rows.stride2 + first;
      return i >= K ? zero() : n == vf::W ? load(p) : load(p, n);
    };
    if constexpr (D::UNIT == 1) return load_at(at_k);
#ifdef ISA_HAS_PAIRS
    else return pair_up(load_at(at_k), load_at(at_k + 1));
#endif
  }

  // n ≤ W vectors from `first` on, elements k_begin to k_end, as rows of units.
  void pack_rows(int64_t first, int n, int64_t k_begin, int64_t k_end, float* to,
                 RowStrides stride) const {
    if (!m.transposed) {
      for (int i = 0; i < n; ++i) {
        const T* from = vector(first + i);
        T last[D::STEP];
        float* row = to + i * stride.row;
        for (int64_t k = k_begin; k < k_end; k += D::STEP, row += stride.step)
          D::pack(step(from, k, last), reinterpret_cast<typename D::Packed*>(row));
      }
      return;
    }
    for (int64_t k = k_begin; k < k_end; k += D::STEP, to += stride.step) {
      for (int part = 0; part < D::PARTS; ++part) {
        vf x[vf::W];
        for (int i = 0; i < vf::W; ++i) x[i] = unit(k, part * vf::W + i, first, n);
        transpose(x);
        for (int i = 0; i < n; ++i) store(to + i * stride.row + part * vf::W, x[i]);
      }
    }
  }

  // n ≤ W vectors from `first` on, elements k_begin to k_end → W lanes of each unit, `width` apart.
  // Lanes beyond n hold anything: what comes of them goes nowhere.
  void pack_lanes(int64_t first, int n, int64_t k_begin, int64_t k_end, float* to,
                  int64_t width) const {
    if (m.quantized && m.quantized->bits == 8)
      return pack_quantized<8>(first, k_begin, k_end, to, width);
    if (m.quantized) return pack_quantized<4>(first, k_begin, k_end, to, width);
    if (m.transposed) {
      for (int64_t k = k_begin; k < k_end; k += D::STEP)
        for (int u = 0; u < STEP_UNITS; ++u, to += width) store(to, unit(k, u, first, n));
      return;
    }
    const T* from[vf::W];
    for (int i = 0; i < vf::W; ++i) from[i] = vector(first + std::min(i, n - 1));
    for (int64_t k = k_begin; k < k_end; k += D::STEP, to += STEP_UNITS * width)
      pack_lanes(from, k, to, width);
  }

  // A step of W vectors.
  void pack_lanes(const T* const (&from)[vf::W], int64_t k, float* to, int64_t width) const {
    if (k + D::STEP <= K) return pack_step(from, k, to, width);
    T last[vf::W][D::STEP];
    const T* at[vf::W];
    for (int i = 0; i < vf::W; ++i) at[i] = step(from[i], k, last[i]);
    pack_step(at, 0, to, width);
  }

 private:
  // Elements of columns are made a block of rows at a time; K counts rows here.
  template <int BITS>
  void pack_quantized(int64_t column, int64_t k_begin, int64_t k_end, float* to,
                      int64_t width) const {
    constexpr int SPAN = std::max<int>(D::STEP, BLOCK);
    const Shape shape(*m.quantized);
    alignas(64) float made[SPAN * vf::W];
    for (int64_t k = k_begin; k < k_end; k += D::STEP) {
      if (k % SPAN == 0) {
        for (int64_t i = 0; i < SPAN && k + i < K; i += BLOCK)
          dequantize_columns<BITS>(*m.quantized, shape, (k + i) / BLOCK, column, made + i * vf::W);
        if (k + SPAN > K) std::fill(made + (K - k) * vf::W, std::end(made), 0.f);
      }
      for (int u = 0; u < STEP_UNITS; ++u, to += width) {
        const float* row = made + (k % SPAN + D::element(u)) * vf::W;
        if constexpr (D::UNIT == 1) store(to, load(row));
#ifdef ISA_HAS_PAIRS
        else store(to, pair_up(load(row), load(row + vf::W)));
#endif
      }
    }
  }

  static void pack_step(const T* const (&from)[vf::W], int64_t k, float* to, int64_t width) {
    constexpr int W = vf::W;
    vf x[W];
    if constexpr (std::is_same_v<T, bf16> && D::PARTS == 2) {
      // Two elements to a word until the words are where they belong: half as many shuffles.
      for (int i = 0; i < W; ++i) x[i] = load(reinterpret_cast<const float*>(from[i] + k));
      transpose(x);
      for (int i = 0; i < W; ++i) {
        vf even, odd;
        split(x[i], even, odd);
        store(to + i * width, even);
        store(to + (W + i) * width, odd);
      }
    } else {
      for (int i = 0; i < W; ++i) x[i] = D::template weights<0>(from[i] + k);
      transpose(x);
      for (int i = 0; i < W; ++i) store(to + i * width, x[i]);
      if constexpr (D::PARTS == 2) {
        for (int i = 0; i < W; ++i) x[i] = D::template weights<1>(from[i] + k);
        transpose(x);
        for (int i = 0; i < W; ++i) store(to + (W + i) * width, x[i]);
      }
    }
  }
};

// Sums (rows, width) → out[r][l], or out[l][r].
template <class T>
static void write_panel(const float* c, int64_t rows, int64_t width, int64_t lanes, T* out,
                        int64_t stride, bool transposed) {
  constexpr int W = vf::W;
  if (!transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      for_each_vector(lanes, [&](int64_t l, auto n) {
        store(out + r * stride + l, load(c + r * width + l), n);
      });
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += W) {
    const int n = int(std::min<int64_t>(W, rows - r));
    for (int64_t l = 0; l < lanes; l += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = i < n ? load(c + (r + i) * width + l) : zero();
      transpose(x);
      for (int i = 0; i < W && l + i < lanes; ++i) {
        T* at = out + (l + i) * stride + r;
        if (n == W) store(at, x[i]);
        else store(at, x[i], n);
      }
    }
  }
}

}  // namespace ISA
}  // namespace llama_fast
