// RoPE of queries and keys in one launch. blockIdx.x is a token (b, t); its threads share the pairs
// of all heads, those of q first.
#include <common/launch.cuh>

#include "common/rotate.cuh"

namespace llama_fast::cuda {

constexpr int THREADS = 256;

template <class T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
rope_fwd_kernel(Heads q, Heads k, T* q_out, T* k_out, const float* cos, const float* sin,
                int64_t cos_stride_b, int64_t cos_stride_t, int64_t sin_stride_b,
                int64_t sin_stride_t, int tokens, int64_t H, int64_t K, int64_t D, bool interleaved) {
  const int64_t b = int(blockIdx.x) / tokens, t = int(blockIdx.x) % tokens;
  const int items = D / 2 / PAIRS<T, WIDE>;  // of a head
  cos += b * cos_stride_b + t * cos_stride_t;
  sin += b * sin_stride_b + t * sin_stride_t;
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < (H + K) * items;
       i += gridDim.y * THREADS) {
    int64_t h = i / items;
    const int64_t p = i % items * PAIRS<T, WIDE>;
    const bool of_q = h < H;
    if (!of_q) h -= H;
    const Heads& in = of_q ? q : k;
    const T* x = static_cast<const T*>(in.data) + b * in.stride.b + t * in.stride.t;
    T* y = (of_q ? q_out : k_out) + (blockIdx.x * (of_q ? H : K) + h) * D;
    rotate<T, PAIRS<T, WIDE>>(x + h * in.stride.h, y, cos, sin, p, D, interleaved);
  }
}

void rope(const Target& target, const RopeArgs& a) {
  const int64_t all = a.B * a.T, pairs = (a.H + a.K) * (a.D / 2);
  if (all == 0 || pairs == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int VEC = VECTOR<T>;
    const bool wide = a.D / 2 % VEC == 0 && whole(VEC, a.q) && whole(VEC, a.k) &&
                      aligned({a.q_out, a.k_out, a.cos, a.sin}) &&
                      whole(4, {a.cos_stride_b, a.cos_stride_t, a.sin_stride_b, a.sin_stride_t});
    const Launch how{"rope_fwd",
                     {unsigned(all), unsigned(ceil_div(pairs / (wide ? VEC : 1), THREADS))},
                     {THREADS}};
    launch(target, how, wide ? rope_fwd_kernel<T, true> : rope_fwd_kernel<T, false>, a.q, a.k,
           static_cast<T*>(a.q_out), static_cast<T*>(a.k_out), a.cos, a.sin, a.cos_stride_b,
           a.cos_stride_t, a.sin_stride_b, a.sin_stride_t, int(a.T), a.H, a.K, a.D, a.interleaved);
  });
}

}  // namespace llama_fast::cuda
