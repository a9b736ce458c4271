// kv_append into a cache in 8 bits: each head of k (rotated, rounded to its dtype) and of v becomes
// bytes and a scale. The scale is the largest magnitude over 127; it is NaN, and the bytes are 0,
// where the head holds an infinity or NaN.
#include <cstring>

#include "dispatch.h"
#include "kernels.h"
#include "parallel.h"
#include "rope.h"
#include "scratch.h"
#include "simd/bytes.h"

namespace llama_fast {
namespace ISA {

template <class T>
static void quantize(const T* x, int64_t D, int8_t* codes, float& scale) {
  vf largest = zero(), bad = zero();
  for_each_vector(D, [&](int64_t d, auto width) {
    const vf v = load(x + d, width);
    largest = max(largest, max(v, zero() - v));
    bad = bad + (v - v);
  });
  scale = max_of(largest) / 127.f + sum(bad);
  if (!(scale > 0.f)) {
    std::memset(codes, 0, size_t(D));
    return;
  }
  for_each_vector(D, [&](int64_t d, auto width) {
    const vf code = round(load(x + d, width) / set(scale));
    const vf bounded = min(max(code, set(-127.f)), set(127.f));
    if constexpr (std::is_same_v<decltype(width), Full>) {
      store_bytes(codes + d, bounded);
    } else {
      int8_t some[vf::W];
      store_bytes(some, bounded);
      std::memcpy(codes + d, some, size_t(width));
    }
  });
}

// The slot of head h in token `position` of row b.
template <class T>
static void put(const QuantizedHeads& cache, int64_t b, int64_t position, int64_t h, const T* x,
                int64_t D) {
  const HeadStrides &codes = cache.stride, &scales = cache.scale_stride;
  quantize(x, D, cache.codes + b * codes.b + position * codes.t + h * codes.h,
           cache.scales[b * scales.b + position * scales.t + h * scales.h]);
}

template <class T> static void append(const KvAppendQuantizedArgs& args) {
  const KvAppendArgs& a = args.plain;
  const int64_t D = a.D, K = a.k.heads;
  parallel_for(a.B * a.T, rope_grain(a.q.heads + 2 * K, D), [&](int64_t begin, int64_t end) {
    struct Rotated;
    T* rotated = reinterpret_cast<T*>(scratch<Rotated>(K * D));
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
      rotate_heads(a.k.at<T>(b, t), a.k.at<T>(next_b, next_t), K, a.k.stride.h, cos, sin, rotated,
                   D, D, a.interleaved);
      for (int64_t h = 0; h < K; ++h) {
        put(args.k_cache, b, position, h, rotated + h * D, D);
        put(args.v_cache, b, position, h, a.v.at<T>(b, t) + h * a.v.stride.h, D);
      }
    }
  });
}

void kv_append_quantized(const KvAppendQuantizedArgs& args) {
  with_type(args.plain.dtype, [&](auto t) { append<decltype(t)>(args); });
}

}  // namespace ISA
}  // namespace llama_fast
