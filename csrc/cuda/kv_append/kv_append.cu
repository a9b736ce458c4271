// Rotates the new tokens' queries and keys and writes keys and values into the cache, in one launch.
// A block's threads share the pairs of all heads: q, then k, then v.
#include <common/launch.cuh>
#include <common/pdl.cuh>

#include "token.cuh"

namespace llama_fast::cuda {

constexpr int THREADS = 256;

template <class T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
kv_append_fwd_kernel(Heads q, Heads k, Heads v, T* q_out, const float* cos, const float* sin,
                     int64_t cos_stride, int64_t sin_stride, Heads k_cache, Heads v_cache,
                     const int64_t* lengths, int64_t lengths_stride, int tokens, int64_t most,
                     int64_t H, int64_t K, int64_t D, bool interleaved) {
  constexpr int COUNT = PAIRS<T, WIDE>;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const Token token(lengths, lengths_stride, tokens, most);
  const int items = D / 2 / COUNT;  // of a head; divisions of 64 bits would take longer than the rest
  cos += token.position * cos_stride;
  sin += token.position * sin_stride;
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < (H + 2 * K) * items;
       i += gridDim.y * THREADS) {
    const int64_t h = i / items, p = i % items * COUNT;
    if (h < H) {
      put_query<T, COUNT>(token, q, q_out, h, cos, sin, p, H, D, interleaved);
    } else if (token.stored && h < H + K) {
      const int64_t of = h - H;
      rotate<T, COUNT>(head<T>(k, token.b, token.t, of), head<T>(k_cache, token.b, token.position, of),
                       cos, sin, p, D, interleaved);
    } else if (token.stored) {
      const int64_t of = h - H - K;
      const PairRuns at(p, COUNT, D, false);
      store_pairs(head<T>(v_cache, token.b, token.position, of), at,
                  load_pairs<COUNT>(head<T>(v, token.b, token.t, of), at));
    }
  }
}

void kv_append(const Target& target, const KvAppendArgs& a) {
  if (a.k_scales.data) return kv_append_quantized(target, a);
  const int64_t all = a.B * a.T, pairs = (a.H + 2 * a.K) * (a.D / 2);
  if (all == 0 || pairs == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int VEC = VECTOR<T>;
    const bool wide = is_wide<T>(a);
    const Launch how{"kv_append_fwd",
                     {unsigned(all), unsigned(ceil_div(pairs / (wide ? VEC : 1), THREADS))},
                     {THREADS},
                     0,
                     true};
    launch(target, how, wide ? kv_append_fwd_kernel<T, true> : kv_append_fwd_kernel<T, false>, a.q,
           a.k, a.v, static_cast<T*>(a.q_out), a.cos, a.sin, a.cos_stride, a.sin_stride,
           a.k_cache, a.v_cache, a.lengths, a.lengths_stride, int(a.T), a.S < a.P ? a.S : a.P, a.H, a.K,
           a.D, a.interleaved);
  });
}

}  // namespace llama_fast::cuda
