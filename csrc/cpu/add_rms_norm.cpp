// total = x + residual, rounded; y = rms_norm(total). The first pass over a row adds, stores the sum
// and squares what it stored; the second reads the sum back from L1.
#include "dispatch.h"
#include "parallel.h"
#include "rms_norm.h"

namespace llama_fast {
namespace ISA {

template <class T> static void add_rms_norm_rows(const AddRmsNormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  parallel_for(a.x_rows.count(), norm_grain(a.C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(a.x) + a.x_rows.offset(n);
      const T* residual = static_cast<const T*>(a.residual) + a.residual_rows.offset(n);
      T* y = static_cast<T*>(a.y) + n * a.C;
      T* total = static_cast<T*>(a.total) + n * a.C;
      const float scale = inverse_rms(a.C, a.eps, [&](int64_t i, auto width) {
        store(total + i, load(x + i, width) + load(residual + i, width), width);
        return load(total + i, width);
      });
      const int64_t next = std::min(n + 1, end - 1);
      scale_row(total, scale, weight, y, a.C, static_cast<const T*>(a.x) + a.x_rows.offset(next),
                static_cast<const T*>(a.residual) + a.residual_rows.offset(next));
    }
  });
}

void add_rms_norm(const AddRmsNormArgs& a) {
  with_type(a.dtype, [&](auto t) { add_rms_norm_rows<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
