// y = x / sqrt(mean(x²) + eps) · weight, each row alone. Two passes over a row that the first one
// has brought into L1: the memory sees one read and one write.
#include <cmath>

#include "dispatch.h"
#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace llama_fast {
namespace ISA {

// 1 / sqrt(mean(x²) + eps). Four accumulators hide the latency of the multiply-add; 32 partial sums
// at least keep the rounding error of a long row small.
template <class T> static float inverse_rms(const T* x, int64_t C, float eps) {
  constexpr int A = vf::W >= 8 ? 4 : 32 / vf::W;
  vf total[A];
  for (vf& t : total) t = zero();
  int64_t i = 0;
  for (; i + A * vf::W <= C; i += A * vf::W) {
    for (int j = 0; j < A; ++j) {
      const vf v = load(x + i + j * vf::W);
      total[j] = fma(v, v, total[j]);
    }
  }
  for_each_vector(C - i, [&](int64_t j, auto width) {
    const vf v = load(x + i + j, width);
    total[0] = fma(v, v, total[0]);
  });
  for (int half = A / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) total[j] = total[j] + total[j + half];
  return 1.f / std::sqrt(sum(total[0]) / float(C) + eps);
}

template <class T> static void rms_norm_rows(const RmsNormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  parallel_for(a.rows.count(), 1 + 16384 / (a.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(a.x) + a.rows.offset(n);
      T* y = static_cast<T*>(a.y) + n * a.C;
      const vf scale = set(inverse_rms(x, a.C, a.eps));
      for_each_vector(a.C, [&](int64_t i, auto width) {
        store(y + i, load(x + i, width) * scale * load(weight + i, width), width);
      });
    }
  });
}

void rms_norm(const RmsNormArgs& a) {
  with_type(a.dtype, [&](auto t) { rms_norm_rows<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
