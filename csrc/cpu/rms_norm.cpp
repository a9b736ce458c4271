// y = x / sqrt(mean(x²) + eps) · weight, each row alone. Two passes over a row that the first one
// has brought into L1: the memory sees one read and one write.
#include "rms_norm.h"

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

}  // namespace ISA
}  // namespace llama_fast
