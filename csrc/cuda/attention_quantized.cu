// Attention against keys and values in 8 bits. Few queries multiply the codes themselves
// (few_queries_quantized.cuh). For many, keys and values are turned into q's dtype, some rows of the batch
// at a time in scratch memory, and attention does the rest.
#include "attention/few_queries_quantized.cuh"

namespace llama_fast::cuda {

constexpr int WIDEN_THREADS = 256;

// Each element of the keys and values below a row's length, times its scale and rounded once: T (B, K, S,
// D). A thread has 16 of them. blockIdx.y counts the heads of the keys, then those of the values.
template <class T, int D>
__global__ void __launch_bounds__(WIDEN_THREADS)
widen_cache_kernel(const __grid_constant__ AttentionQuantizedArgs args) {
  constexpr int CHUNKS = D / 16;  // of a head's vector
  const AttentionArgs& a = args.plain;
  const int K = int(a.K), b = blockIdx.z, kv = blockIdx.y % K;
  const bool of_k = int(blockIdx.y) < K;
  const Problem<T, int8_t> problem(a, kv, b);
  const int64_t s = (int64_t(blockIdx.x) * WIDEN_THREADS + threadIdx.x) / CHUNKS;
  const int d = threadIdx.x % CHUNKS * 16;
  if (s >= problem.length) return;
  const HeadScales& scales = of_k ? args.k_scales : args.v_scales;
  const float scale =
      scales.data[b * scales.stride.b + s * scales.stride.t + kv * scales.stride.h];
  const int8_t* codes =
      of_k ? problem.k + s * problem.k_stride : problem.v + s * problem.v_stride;
  const Pack<int8_t, 16> from = load<16>(codes + d);
  Pack<T, 16> to;
#pragma unroll
  for (int i = 0; i < 16; ++i) to.v[i] = from_float<T>(float(from.v[i]) * scale);
  T* wide = static_cast<T*>(of_k ? args.wide_k : args.wide_v);
  store(wide + ((int64_t(b) * K + kv) * a.S + s) * D + d, to);
}

template <class T, int D>
static void launch_few_quantized(const Target& target, const AttentionQuantizedArgs& args) {
  launch(target, launch_of_few<FewQueriesQuantizedShared<D>>("attention_few_quantized", args.plain),
         attention_few_quantized_kernel<T, D>, args);
}

template <class T, int D>
static void attend_many_quantized(const Target& target, const AttentionQuantizedArgs& all) {
  const AttentionArgs& a = all.plain;
  for (int64_t b = 0; b < a.B; b += all.wide_rows) {
    AttentionQuantizedArgs some = all;
    AttentionArgs& plain = some.plain;
    plain.B = a.B - b < all.wide_rows ? a.B - b : all.wide_rows;
    plain.q = static_cast<const T*>(a.q) + b * a.q_stride.b;
    plain.o = static_cast<T*>(a.o) + b * a.T * a.H * D;
    plain.k = static_cast<const int8_t*>(a.k) + b * a.k_stride.b;
    plain.v = static_cast<const int8_t*>(a.v) + b * a.v_stride.b;
    some.k_scales.data += b * all.k_scales.stride.b;
    some.v_scales.data += b * all.v_scales.stride.b;
    if (a.lengths) plain.lengths += b;
    if (a.S > 0) {
      const Launch how{"widen_cache",
                       {unsigned(ceil_div(a.S * (D / 16), WIDEN_THREADS)), unsigned(2 * a.K),
                        unsigned(plain.B)},
                       {WIDEN_THREADS}};
      launch(target, how, widen_cache_kernel<T, D>, some);
    }
    plain.k = all.wide_k;
    plain.v = all.wide_v;
    plain.k_stride = plain.v_stride = {a.K * a.S * D, D, a.S * D};
    attention(target, plain);
  }
}

void attention_quantized(const Target& target, const AttentionQuantizedArgs& args) {
  const AttentionArgs& a = args.plain;
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  const auto run = [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    if (a.T * (a.H / a.K) <= FEW_ROWS) launch_few_quantized<T, D>(target, args);
    else attend_many_quantized<T, D>(target, args);
  };
  with_type(a.dtype, [&](auto type) {
    if constexpr (!std::is_same_v<typename decltype(type)::type, float>) {
      if (a.D == 64) run(type, std::integral_constant<int, 64>{});
      else run(type, std::integral_constant<int, 128>{});
    }
  });
}

}  // namespace llama_fast::cuda
