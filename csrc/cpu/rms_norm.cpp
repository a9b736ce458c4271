// y = x / sqrt(mean(x²) + eps) · weight, each row alone. Two passes over a row that the first one
// has brought into L1: the memory sees one read and one write.
//
// Backward, with r = 1 / sqrt(mean(x²) + eps), g the gradient of y and g' that of x itself:
//     dx = r · g·w - x · r³ · mean(g·w·x) + g'        dw = Σ over rows of g · x · r
// Again two passes over a row, of which the first makes both means. Rows are cut into blocks by their
// number alone; each block adds its rows to a part of dw of its own, and the parts are added in their
// order. So the bits of dw do not depend on threads.
#include "rms_norm.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace llama_fast {
namespace ISA {

template <class T> static void rms_norm_rows(const RmsNormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  parallel_for(a.rows.count(), norm_grain(a.C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(a.x) + a.rows.offset(n);
      T* y = static_cast<T*>(a.y) + n * a.C;
      const float scale = inverse_rms(
          a.C, a.eps, [&](int64_t i, auto width) { return load(x + i, width); });
      const int64_t next = a.rows.offset(std::min(n + 1, end - 1));
      scale_row(x, scale, weight, y, a.C, static_cast<const T*>(a.x) + next);
    }
  });
}

void rms_norm(const RmsNormArgs& a) {
  with_type(a.dtype, [&](auto t) { rms_norm_rows<decltype(t)>(a); });
}

// Of one row. `part` gains its share of dw; its floats lie beside elements of T, in load2's order.
template <class T>
static inline void norm_backward_row(const T* g, const T* g_total, const T* x, const T* weight,
                                     T* dx, float* part, int64_t C, float eps) {
  constexpr int A = vf::W >= 8 ? 4 : 32 / vf::W;  // as in inverse_rms
  vf squares[A], products[A];
  for (int j = 0; j < A; ++j) squares[j] = products[j] = zero();
  const auto add = [&](int j, vf x, vf gw) {
    squares[j] = fma(x, x, squares[j]);
    products[j] = fma(gw, x, products[j]);
  };
  int64_t i = 0;
  for (; i + A * vf::W <= C; i += A * vf::W) {
    for (int j = 0; j < A; j += 2) {
      const int64_t at = i + j * vf::W;
      const vf2 v = load2(x + at), gw = load2(g + at) * load2(weight + at);
      add(j, v.a, gw.a);
      add(j + 1, v.b, gw.b);
    }
  }
  for_each_vector(C - i, [&](int64_t j, auto width) {
    add(0, load(x + i + j, width), load(g + i + j, width) * load(weight + i + j, width));
  });
  for (int half = A / 2; half; half /= 2) {
    for (int j = 0; j < half; ++j) {
      squares[j] = squares[j] + squares[j + half];
      products[j] = products[j] + products[j + half];
    }
  }
  const float scale = 1.f / std::sqrt(sum(squares[0]) / float(C) + eps);
  // In this order: of large x the cube of the scale alone would vanish.
  const float mean = sum(products[0]) * scale / float(C) * scale * scale;
  const vf r = set(scale), along_x = set(-mean);
  for_each_pair(C, [&](int64_t i, auto width) {
    const auto v = load(x + i, width), gradient = load(g + i, width);
    auto d = gradient * load(weight + i, width) * r + v * along_x;
    if (g_total) d = d + load(g_total + i, width);
    store(dx + i, d, width);
    store(part + i, load(part + i, width) + gradient * (v * r), width);
  });
}

template <class T> static void norm_backward(const RmsNormBackwardArgs& a) {
  const int64_t N = a.x_rows.count(), C = a.C;
  const T* weight = static_cast<const T*>(a.weight);
  float* parts = static_cast<float*>(a.dw_partials);
  parallel_for(a.partials, 1 + norm_grain(C) * a.partials / (N + 1), [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      float* part = parts + p * C;
      std::fill(part, part + C, 0.f);
      for (int64_t n = N * p / a.partials; n < N * (p + 1) / a.partials; ++n) {
        const T* g_total = static_cast<const T*>(a.grad_total);
        norm_backward_row(static_cast<const T*>(a.grad) + a.grad_rows.offset(n),
                          g_total ? g_total + a.grad_total_rows.offset(n) : nullptr,
                          static_cast<const T*>(a.x) + a.x_rows.offset(n), weight,
                          static_cast<T*>(a.dx) + n * C, part, C, a.eps);
      }
    }
  });
  T* dw = static_cast<T*>(a.dw);
  constexpr int64_t COLUMNS = 512;  // whole pairs of vectors, whose order the parts have
  parallel_for((C + COLUMNS - 1) / COLUMNS, 1 + ELEMENTS_OF_A_THREAD / (COLUMNS * (a.partials + 1)),
               [&](int64_t begin, int64_t end) {
    const int64_t first = begin * COLUMNS, last = end * COLUMNS < C ? end * COLUMNS : C;
    for_each_pair(last - first, [&](int64_t i, auto width) {
      auto total = set_like(load(weight + first + i, width), 0.f);
      for (int64_t p = 0; p < a.partials; ++p)
        total = total + load(parts + p * C + first + i, width);
      store(dw + first + i, total, width);
    });
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& a) {
  with_type(a.dtype, [&](auto t) { norm_backward<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
