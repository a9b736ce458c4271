// q and k rotated by each token's angles, which all of its heads share.
#include "rope.h"

#include "dispatch.h"
#include "parallel.h"

namespace llama_fast {
namespace ISA {

template <class T> static void rope_tokens(const RopeArgs& a) {
  const int64_t heads = a.H + a.K;
  parallel_for(a.B * a.T, rope_grain(heads, a.D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / a.T, t = n % a.T;
      const int64_t next = n + 1 < end ? n + 1 : n, next_b = next / a.T, next_t = next % a.T;
      const float* cos = a.cos + b * a.cos_stride_b + t * a.cos_stride_t;
      const float* sin = a.sin + b * a.sin_stride_b + t * a.sin_stride_t;
      T* q_out = static_cast<T*>(a.q_out) + n * a.H * a.D;
      T* k_out = static_cast<T*>(a.k_out) + n * a.K * a.D;
      rotate_heads(a.q.at<T>(b, t), a.q.at<T>(next_b, next_t), a.H, a.q.stride.h, cos, sin,
                   q_out, a.D, a.D, a.interleaved);
      rotate_heads(a.k.at<T>(b, t), a.k.at<T>(next_b, next_t), a.K, a.k.stride.h, cos, sin,
                   k_out, a.D, a.D, a.interleaved);
    }
  });
}

void rope(const RopeArgs& a) {
  with_type(a.dtype, [&](auto t) { rope_tokens<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
