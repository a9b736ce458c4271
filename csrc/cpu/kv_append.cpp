// q rotated; k rotated into its slot of the cache; v copied into its. A token's position is its
// slot and the row of its angles; where it is negative, nothing is stored and q is 0. No row ends
// beyond the cache or the tables: the binding has looked.
#include <cstring>

#include "dispatch.h"
#include "kernels.h"
#include "parallel.h"
#include "rope.h"

namespace llama_fast {
namespace ISA {

template <class T> static void kv_append_tokens(const KvAppendArgs& a) {
  const int64_t D = a.D;
  const int64_t heads = a.q.heads + 2 * a.k.heads;
  parallel_for(a.B * a.T, rope_grain(heads, D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / a.T, t = n % a.T;
      const int64_t next = n + 1 < end ? n + 1 : n, next_b = next / a.T, next_t = next % a.T;
      const int64_t position = a.position(b, t);
      T* q_out = static_cast<T*>(a.q_out) + n * a.q.heads * D;
      if (position < 0) {
        std::memset(q_out, 0, size_t(a.q.heads * D) * sizeof(T));
        continue;
      }
      const float* cos = a.cos + position * a.cos_stride;
      const float* sin = a.sin + position * a.sin_stride;
      rotate_heads(a.q.at<T>(b, t), a.q.at<T>(next_b, next_t), a.q.heads, a.q.stride.h, cos, sin,
                   q_out, D, D, a.interleaved);
      rotate_heads(a.k.at<T>(b, t), a.k.at<T>(next_b, next_t), a.k.heads, a.k.stride.h, cos, sin,
                   a.k_cache.at<T>(b, position), a.k_cache.stride.h, D, a.interleaved);
      const T* v = a.v.at<T>(b, t);
      T* slot = a.v_cache.at<T>(b, position);
      for (int64_t h = 0; h < a.v.heads; ++h)
        std::memcpy(slot + h * a.v_cache.stride.h, v + h * a.v.stride.h, size_t(D) * sizeof(T));
    }
  });
}

void kv_append(const KvAppendArgs& a) {
  with_type(a.dtype, [&](auto t) { kv_append_tokens<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
