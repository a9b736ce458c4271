// The two halves of RMSNorm on one row, which rms_norm and add_rms_norm share.
#pragma once

#include <cmath>

#include "kernel_choice.h"
#include "simd/pair.h"

namespace llama_fast {
namespace ISA {

// 1 / sqrt(mean(v²) + eps) over the C values v = value(i, width). Four accumulators hide the
// latency of the multiply-add; 32 partial sums at least keep the rounding error of a long row small.
template <class F> static inline float inverse_rms(int64_t C, float eps, F&& value) {
  constexpr int A = vf::W >= 8 ? 4 : 32 / vf::W;
  vf total[A];
  for (vf& t : total) t = zero();
  int64_t i = 0;
  for (; i + A * vf::W <= C; i += A * vf::W) {
    for (int j = 0; j < A; j += 2) {
      const vf2 v = value(i + j * vf::W, Pair{});
      total[j] = fma(v.a, v.a, total[j]);
      total[j + 1] = fma(v.b, v.b, total[j + 1]);
    }
  }
  for_each_vector(C - i, [&](int64_t j, auto width) {
    const vf v = value(i + j, width);
    total[0] = fma(v, v, total[0]);
  });
  for (int half = A / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) total[j] = total[j] + total[j + half];
  return 1.f / std::sqrt(sum(total[0]) / float(C) + eps);
}

// y = x · scale · weight, over C elements. What stands at `ahead...` is fetched meanwhile: the next
// row, which memory would otherwise not send before this one is done.
template <class T, class... Ahead>
static inline void scale_row(const T* x, float scale, const T* weight, T* y, int64_t C,
                             const Ahead*... ahead) {
  const vf s = set(scale);
  for_each_pair(C, [&](int64_t i, auto width) {
    for (int64_t line = 0; line < 2 * vf::W; line += 64 / int64_t(sizeof(T)))
      (__builtin_prefetch(ahead + i + line), ...);
    store(y + i, load(x + i, width) * s * load(weight + i, width), width);
  });
}

// Rows for one thread at least, so that sharing them pays.
static inline int64_t norm_grain(int64_t C) { return 1 + ELEMENTS_OF_A_THREAD / (C + 1); }

}  // namespace ISA
}  // namespace llama_fast
