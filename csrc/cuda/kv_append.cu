// Rotates the new tokens' queries and keys and writes keys and values into the cache, in one launch.
//
// Token t of row b has the position and slot p = lengths[b] - T + t. A token at a negative position,
// or beyond the cache or the tables, is not stored and its query is 0. blockIdx.x is a token; its
// threads share the pairs of all heads: q, then k, then v.
#include <common/launch.cuh>
#include <common/overlap.cuh>

#include "common/rotate.cuh"

namespace llama_fast::cuda {

constexpr int THREADS = 256;

template <class T>
__device__ __forceinline__ T* head(const Heads& heads, int64_t b, int64_t t, int64_t h) {
  return static_cast<T*>(heads.data) + b * heads.stride_b + t * heads.stride_t +
         h * heads.stride_h;
}

template <class T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
kv_append_fwd_kernel(Heads q, Heads k, Heads v, T* q_out, const float* cos, const float* sin,
                     int64_t cos_stride, int64_t sin_stride, Heads k_cache, Heads v_cache,
                     const int64_t* lengths, int64_t lengths_stride, int tokens, int64_t most,
                     int64_t D, bool interleaved) {
  constexpr int COUNT = PAIRS<T, WIDE>;
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int64_t b = int(blockIdx.x) / tokens, t = int(blockIdx.x) % tokens;
  const int64_t position = lengths[b * lengths_stride] - tokens + t;
  const bool valid = position >= 0 && position < most;
  const int items = D / 2 / COUNT;  // of a head; divisions of 64 bits would take longer than the rest
  cos += position * cos_stride;
  sin += position * sin_stride;
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < (q.heads + 2 * k.heads) * items;
       i += gridDim.y * THREADS) {
    const int64_t h = i / items, p = i % items * COUNT;
    if (h < q.heads) {
      T* y = q_out + (blockIdx.x * q.heads + h) * D;
      if (valid) {
        rotate<T, COUNT>(head<T>(q, b, t, h), y, cos, sin, p, D, interleaved);
      } else {
        Pack<T, COUNT> zeros;
        for (int j = 0; j < COUNT; ++j) zeros.v[j] = from_float<T>(0.0f);
        store(y + p, zeros);
        store(y + p + D / 2, zeros);
      }
    } else if (valid && h < q.heads + k.heads) {
      const int64_t of = h - q.heads;
      rotate<T, COUNT>(head<T>(k, b, t, of), head<T>(k_cache, b, position, of), cos, sin, p, D,
                       interleaved);
    } else if (valid) {
      const int64_t of = h - q.heads - k.heads;
      const T* x = head<T>(v, b, t, of);
      T* y = head<T>(v_cache, b, position, of);
      store(y + p, load<COUNT>(x + p));
      store(y + p + D / 2, load<COUNT>(x + p + D / 2));
    }
  }
}

void kv_append(const Target& target, const KvAppendArgs& a) {
  const int64_t all = a.B * a.T, pairs = (a.q.heads + 2 * a.k.heads) * (a.D / 2);
  if (all == 0 || pairs == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int VEC = VECTOR<T>;
    const bool wide = a.D / 2 % VEC == 0 && whole(VEC, a.q) && whole(VEC, a.k) &&
                      whole(VEC, a.v) && whole(VEC, a.k_cache) && whole(VEC, a.v_cache) &&
                      aligned({a.q_out, a.cos, a.sin}) && whole(4, {a.cos_stride, a.sin_stride});
    const Launch how{"kv_append_fwd",
                     {unsigned(all), unsigned(ceil_div(pairs / (wide ? VEC : 1), THREADS))},
                     {THREADS},
                     0,
                     true};
    launch(target, how, wide ? kv_append_fwd_kernel<T, true> : kv_append_fwd_kernel<T, false>, a.q,
           a.k, a.v, static_cast<T*>(a.q_out), a.cos, a.sin, a.cos_stride, a.sin_stride,
           a.k_cache, a.v_cache, a.lengths, a.lengths_stride, int(a.T), a.S < a.P ? a.S : a.P, a.D,
           a.interleaved);
  });
}

}  // namespace llama_fast::cuda
