// Attention against keys and values in 8 bits. Few queries multiply the integers themselves
// (decode_quantized.cuh). For many, keys and values are turned into q's dtype, some rows of the batch
// at a time in scratch memory, and attention does the rest.
#include "decode_quantized.cuh"

namespace llama_fast::cuda {

constexpr int DEQUANTIZE_THREADS = 256;

// Each element of the keys and values below a row's length, times its scale and rounded once: T (B, K, S,
// D). A thread has 16 of them. blockIdx.y counts the heads of the keys, then those of the values.
template <class T, int D>
__global__ void __launch_bounds__(DEQUANTIZE_THREADS)
dequantize_cache_kernel(const __grid_constant__ AttentionArgs a,
                   const __grid_constant__ AttentionScratch scratch) {
  constexpr int CHUNKS = D / 16;  // of a head's vector
  const int K = int(a.K), b = blockIdx.z, kv = blockIdx.y % K;
  const bool of_k = int(blockIdx.y) < K;
  const Problem<T, int8_t> problem(a, kv, b);
  const int64_t s = (int64_t(blockIdx.x) * DEQUANTIZE_THREADS + threadIdx.x) / CHUNKS;
  const int d = threadIdx.x % CHUNKS * 16;
  if (s >= problem.length) return;
  const HeadScales& scales = of_k ? a.k_scales : a.v_scales;
  const float scale =
      scales.data[b * scales.stride.b + s * scales.stride.t + kv * scales.stride.h];
  const int8_t* qdata =
      of_k ? problem.k + s * problem.k_stride : problem.v + s * problem.v_stride;
  const Pack<int8_t, 16> from = load<16>(qdata + d);
  Pack<T, 16> to;
#pragma unroll
  for (int i = 0; i < 16; ++i) to.v[i] = from_float<T>(float(from.v[i]) * scale);
  T* wide = static_cast<T*>(of_k ? scratch.k : scratch.v);
  store(wide + ((int64_t(b) * K + kv) * a.S + s) * D + d, to);
}

template <class T, int D>
static void launch_decode_quantized(const Target& target, const AttentionArgs& a,
                                 const AttentionScratch& scratch) {
  launch(target,
         decode_launch<DecodeQuantizedShared<D>>("attention_decode_quantized", a, scratch.splits),
         attention_decode_quantized_kernel<T, D>, a, scratch);
}

template <class T, int D>
static void prefill_quantized(const Target& target, const AttentionArgs& a,
                                  const AttentionScratch& scratch) {
  for (int64_t b = 0; b < a.B; b += scratch.rows) {
    AttentionArgs some = a;
    some.B = a.B - b < scratch.rows ? a.B - b : scratch.rows;
    some.q.data = a.q.at<T>(b, 0);
    some.o = static_cast<T*>(a.o) + b * a.T * a.H * D;
    some.k.data = a.k.at<int8_t>(b, 0);
    some.v.data = a.v.at<int8_t>(b, 0);
    some.k_scales.data += b * a.k_scales.stride.b;
    some.v_scales.data += b * a.v_scales.stride.b;
    if (a.lengths) some.lengths += b;
    if (a.S > 0) {
      const Launch how{"dequantize_cache",
                       {unsigned(ceil_div(a.S * (D / 16), DEQUANTIZE_THREADS)), unsigned(2 * a.K),
                        unsigned(some.B)},
                       {DEQUANTIZE_THREADS}};
      launch(target, how, dequantize_cache_kernel<T, D>, some, scratch);
    }
    const HeadStrides stride{a.K * a.S * D, D, a.S * D};
    some.k = {scratch.k, stride};
    some.v = {scratch.v, stride};
    some.k_scales = some.v_scales = {};
    attention(target, some, scratch);
  }
}

void attention_quantized(const Target& target, const AttentionArgs& a,
                         const AttentionScratch& scratch) {
  const auto run = [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    if (is_decode(a.T, a.H, a.K)) launch_decode_quantized<T, D>(target, a, scratch);
    else prefill_quantized<T, D>(target, a, scratch);
  };
  with_type(a.dtype, [&](auto type) {
    if constexpr (!std::is_same_v<typename decltype(type)::type, float>) {
      if (a.D == 64) run(type, std::integral_constant<int, 64>{});
      else run(type, std::integral_constant<int, 128>{});
    }
  });
}

}  // namespace llama_fast::cuda
