// q rotated; k rotated into its slot of the cache; v into its. A token's position is its slot and the
// row of its angles; where it is negative, nothing is stored and q is 0. No row ends beyond the cache
// or the tables: the binding has looked.
//
// In a cache of 8 bits each head of k (rotated, rounded to its dtype) and of v becomes bytes and a
// scale. The scale is the largest magnitude over 127; it is NaN, and the bytes are 0, where the head
// holds an infinity or NaN.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "rope.h"
#include "scratch.h"
#include "simd/bytes.h"

namespace llama_fast {
namespace ISA {

// Calls store(k, ahead, v, cos, sin, b, position) for every token that has a slot, with its heads of
// k and v, and the k that comes next. q is done here.
template <class T, class Store>
static void append_tokens(const KvAppendArgs& a, Store&& store) {
  parallel_for(a.B * a.T, rope_grain(a.H + 2 * a.K, a.D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / a.T, t = n % a.T;
      const int64_t next = n + 1 < end ? n + 1 : n, next_b = next / a.T, next_t = next % a.T;
      // A row of no tokens or less stores none, and a length near the least integer must not wrap.
      const int64_t length = std::max<int64_t>(a.lengths[b * a.lengths_stride], 0);
      const int64_t position = length - a.T + t;
      T* q_out = static_cast<T*>(a.q_out) + n * a.H * a.D;
      if (position < 0) {
        std::memset(q_out, 0, size_t(a.H * a.D) * sizeof(T));
        continue;
      }
      const float* cos = a.cos + position * a.cos_stride;
      const float* sin = a.sin + position * a.sin_stride;
      rotate_heads(a.q.at<T>(b, t), a.q.at<T>(next_b, next_t), a.H, a.q.stride.h, cos, sin, q_out,
                   a.D, a.D, a.interleaved);
      store(a.k.at<T>(b, t), a.k.at<T>(next_b, next_t), a.v.at<T>(b, t), cos, sin, b, position);
    }
  });
}

template <class T> static void append(const KvAppendArgs& a) {
  append_tokens<T>(a, [&](const T* k, const T* ahead, const T* v, const float* cos,
                          const float* sin, int64_t b, int64_t position) {
    rotate_heads(k, ahead, a.K, a.k.stride.h, cos, sin, a.k_cache.at<T>(b, position),
                 a.k_cache.stride.h, a.D, a.interleaved);
    T* slot = a.v_cache.at<T>(b, position);
    for (int64_t h = 0; h < a.K; ++h)
      std::memcpy(slot + h * a.v_cache.stride.h, v + h * a.v.stride.h, size_t(a.D) * sizeof(T));
  });
}

// x (D,) as bytes and a scale.
template <class T>
static void quantize(const T* x, int64_t D, int8_t* qdata, float& scale) {
  vf largest = zero(), bad = zero();
  for_each_vector(D, [&](int64_t d, auto width) {
    const vf v = load(x + d, width);
    largest = max(largest, max(v, zero() - v));
    bad = bad + (v - v);
  });
  scale = max_of(largest) / 127.f + sum(bad);
  if (!(scale > 0.f)) {
    std::memset(qdata, 0, size_t(D));
    return;
  }
  for_each_vector(D, [&](int64_t d, auto width) {
    const vf value = round(load(x + d, width) / set(scale));
    const vf bounded = min(max(value, set(-127.f)), set(127.f));
    if constexpr (std::is_same_v<decltype(width), Full>) {
      store_bytes(qdata + d, bounded);
    } else {
      int8_t some[vf::W];
      store_bytes(some, bounded);
      std::memcpy(qdata + d, some, size_t(width));
    }
  });
}

template <class T> static void append_quantized(const KvAppendArgs& a) {
  const auto put = [&](const Heads& cache, const HeadScales& scales, int64_t b, int64_t position,
                       int64_t h, const T* x) {
    const HeadStrides& stride = scales.stride;
    quantize(x, a.D, cache.at<int8_t>(b, position) + h * cache.stride.h,
             scales.data[b * stride.b + position * stride.t + h * stride.h]);
  };
  append_tokens<T>(a, [&](const T* k, const T* ahead, const T* v, const float* cos,
                          const float* sin, int64_t b, int64_t position) {
    struct Rotated;
    T* rotated = reinterpret_cast<T*>(scratch<Rotated>(a.K * a.D));
    rotate_heads(k, ahead, a.K, a.k.stride.h, cos, sin, rotated, a.D, a.D, a.interleaved);
    for (int64_t h = 0; h < a.K; ++h) {
      put(a.k_cache, a.k_scales, b, position, h, rotated + h * a.D);
      put(a.v_cache, a.v_scales, b, position, h, v + h * a.v.stride.h);
    }
  });
}

void kv_append(const KvAppendArgs& a) {
  with_type(a.dtype, [&](auto t) {
    if (a.k_scales.data) append_quantized<decltype(t)>(a);
    else append<decltype(t)>(a);
  });
}

}  // namespace ISA
}  // namespace llama_fast
