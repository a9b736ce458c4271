// kv_append into a cache of 8 bits, in one launch: each head of k (rotated, rounded to its dtype) and of
// v becomes integers and a scale.
//
// A head has LANES threads of a warp, as many as its pairs keep busy. Those of k and v go over their head
// twice: for the largest magnitude, which the lanes find together, and for the integers. The second time
// the head comes from the first cache.
#include <common/launch.cuh>
#include <common/pdl.cuh>

#include "../common/reduce.cuh"
#include "token.cuh"

namespace llama_fast::cuda {

constexpr int THREADS = 256;
constexpr float LARGEST_VALUE = 127.0f;

// The bits of |x|. They are in the order of the numbers, infinity and then NaN above all of them.
__device__ __forceinline__ uint32_t magnitude(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

template <class T, int COUNT>
__device__ __forceinline__ uint32_t largest_magnitude(const Pack<T, COUNT>& x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) largest = max(largest, magnitude(to_float(x.v[i])));
  return largest;
}

// x / scale rounded to even; 0 for a scale of 0, of infinity or of NaN.
template <class T, int COUNT>
__device__ __forceinline__ Pack<int8_t, COUNT> codes_of(const Pack<T, COUNT>& x, float scale) {
  const bool usable = scale > 0.0f && magnitude(scale) < 0x7f800000u;
  Pack<int8_t, COUNT> qdata;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float value = usable ? rintf(to_float(x.v[i]) / scale) : 0.0f;
    // Beyond 127 where the scale is too small to be exact.
    qdata.v[i] = static_cast<int8_t>(fminf(fmaxf(value, -LARGEST_VALUE), LARGEST_VALUE));
  }
  return qdata;
}

template <class T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
kv_append_quantized_fwd_kernel(const __grid_constant__ KvAppendArgs a, int lanes) {
  constexpr int COUNT = PAIRS<T, WIDE>;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const Token token(a.lengths, a.lengths_stride, int(a.T), min(a.S, a.P));
  const float* cos = a.cos + token.position * a.cos_stride;
  const float* sin = a.sin + token.position * a.sin_stride;
  const int H = int(a.H), K = int(a.K), items = int(a.D) / 2 / COUNT;
  const int h = (blockIdx.y * THREADS + threadIdx.x) / lanes, lane = threadIdx.x % lanes;
  if (h < H) {
    for (int i = lane; i < items; i += lanes)
      put_query<T, COUNT>(token, a.q, static_cast<T*>(a.q_out), h, cos, sin, i * COUNT, H,
                          a.D, a.interleaved);
  }

  const bool stored = token.stored && h >= H && h < H + 2 * K, of_k = h < H + K;
  const int64_t of = of_k ? h - H : h - H - K;
  const auto runs = [&](int i) { return PairRuns(i * COUNT, COUNT, a.D, of_k && a.interleaved); };
  const auto pairs = [&](int i) {
    const T* x = head<T>(of_k ? a.k : a.v, token.b, token.t, of);
    const HeadPairs<T, COUNT> loaded = load_pairs<COUNT>(x, runs(i));
    return of_k ? rotated(loaded, cos, sin, i * COUNT, a.interleaved) : loaded;
  };
  uint32_t largest = 0;
  if (stored) {
    for (int i = lane; i < items; i += lanes) {
      const HeadPairs<T, COUNT> x = pairs(i);
      largest = max(largest, max(largest_magnitude(x.first), largest_magnitude(x.second)));
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2)  // whole warps, whatever their heads
    largest = max(largest, __shfl_xor_sync(WHOLE_WARP, largest, distance));
  if (!stored) return;

  float scale;
  memcpy(&scale, &largest, sizeof scale);
  scale /= LARGEST_VALUE;
  const HeadScales& scales = of_k ? a.k_scales : a.v_scales;
  const HeadStrides& stride = scales.stride;
  if (lane == 0)
    scales.data[token.b * stride.b + token.position * stride.t + of * stride.h] = scale;
  int8_t* qdata = head<int8_t>(of_k ? a.k_cache : a.v_cache, token.b, token.position, of);
  for (int i = lane; i < items; i += lanes) {
    const HeadPairs<T, COUNT> x = pairs(i);
    store_pairs(qdata, runs(i),
                HeadPairs<int8_t, COUNT>{codes_of(x.first, scale), codes_of(x.second, scale)});
  }
}

void kv_append_quantized(const Target& target, const KvAppendArgs& a) {
  const int64_t all = a.B * a.T, heads = a.H + 2 * a.K;
  if (all == 0 || heads * a.D == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int VEC = VECTOR<T>;
    const bool wide = is_wide<T>(a);
    const int64_t items = a.D / 2 / (wide ? VEC : 1);
    int lanes = 1;
    while (lanes < WARP && lanes < items) lanes *= 2;
    const Launch how{"kv_append_quantized_fwd",
                     {unsigned(all), unsigned(ceil_div(heads * lanes, THREADS))},
                     {THREADS},
                     0,
                     true};
    launch(target, how,
           wide ? kv_append_quantized_fwd_kernel<T, true> : kv_append_quantized_fwd_kernel<T, false>,
           a, lanes);
  });
}

}  // namespace llama_fast::cuda
