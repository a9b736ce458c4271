// o = softmax(scale · q·kᵀ) v with grouped heads. The launcher takes one of three kernels:
// decode.cuh where 16 rows hold all the queries of a KV head, otherwise prefill_sm90.cuh where it is
// asked for and serves the call, prefill.cuh where not. Packed documents are the prefill's.
#include "decode.cuh"
#include "prefill.cuh"
#include "prefill_sm90.cuh"

namespace llama_fast::cuda {

constexpr size_t MOST_SHARED_SM90 = 227 * 1024;

template <class T, int D>
static void launch_decode(const Target& target, const AttentionArgs& a,
                       const AttentionScratch& scratch) {
  launch(target, decode_launch<DecodeShared<T, D>>("attention_decode", a, scratch.splits),
         attention_decode_kernel<T, D>, a, scratch);
}

template <class T, int D, int WARPS>
static void launch_prefill(const Target& target, const AttentionArgs& a) {
  using Shared = PrefillShared<T, D>;
  static_assert(sizeof(Shared) <= MOST_SHARED, "fits every GPU");
  const int64_t rows = a.T * (a.H / a.K);
  const Launch how{"attention_prefill",
                   {unsigned(a.K), unsigned(ceil_div(rows, WARPS * 16)),
                    unsigned(a.cu_seqlens ? a.documents : a.B)},
                   {WARPS * WARP},
                   sizeof(Shared)};
  launch(target, how, attention_prefill_kernel<T, D, WARPS>, a);
}

// A tensor map has no strides of 0, and a scale that is negative would make a maximum a minimum. Tiles
// of its boxes could not end where a document does.
static bool fits_warpgroups(const AttentionArgs& a) {
  const auto fits = [&](const HeadStrides& stride) {
    return (a.S == 1 || stride.t > 0) && (a.K == 1 || stride.h > 0) && (a.B == 1 || stride.b > 0);
  };
  return !a.cu_seqlens && a.S > 0 && a.scale.unit > 0.0f && fits(a.k.stride) && fits(a.v.stride);
}

template <class T, int D>
static void launch_warpgroups(const Target& target, const AttentionArgs& a) {
  using Shared = WarpgroupsShared<T, D>;
  static_assert(sizeof(Shared) <= MOST_SHARED_SM90, "fits sm_90");
  const int64_t rows = a.T * (a.H / a.K);
  const Launch how{"attention_prefill_wgmma",
                   {unsigned(a.K), unsigned(ceil_div(rows, CONSUMERS * CONSUMER_ROWS)),
                    unsigned(a.B)},
                   {WARPGROUP_THREADS},
                   sizeof(Shared)};
  // (D, S, K, B); the stride of a dim of size 1 counts for nothing, and may be one that no map takes.
  const auto map = [&](const void* data, const HeadStrides& stride) {
    const auto bytes = [](int64_t size, int64_t stride) {
      return uint64_t(size == 1 ? D : stride) * sizeof(T);
    };
    return tensor_map<T>(how, data, {D, uint64_t(a.S), uint64_t(a.K), uint64_t(a.B)},
                         {bytes(a.S, stride.t), bytes(a.K, stride.h), bytes(a.B, stride.b)},
                         WIDE_TILE);
  };
  launch(target, how, attention_prefill_wgmma_kernel<T, D>, a, map(a.k.data, a.k.stride),
         map(a.v.data, a.v.stride));
}

template <class T, int D>
static void launch_attention(const Target& target, const AttentionArgs& a,
                             const AttentionScratch& scratch) {
  const int64_t rows = a.T * (a.H / a.K);
  if (!a.cu_seqlens && is_decode(a.T, a.H, a.K)) launch_decode<T, D>(target, a, scratch);
  else if (scratch.warpgroups && fits_warpgroups(a)) launch_warpgroups<T, D>(target, a);
  else if (rows <= SMALL_PREFILL_ROWS) launch_prefill<T, D, 4>(target, a);
  else launch_prefill<T, D, 8>(target, a);
}

int64_t attention_partial_bytes(int64_t D) {
  return D == 64 ? sizeof(Partial<64>) : sizeof(Partial<128>);
}

void attention_quantized(const Target&, const AttentionArgs&, const AttentionScratch&);

void attention(const Target& target, const AttentionArgs& a, const AttentionScratch& scratch) {
  if (a.B == 0 || a.T == 0 || a.H == 0 || (a.cu_seqlens && a.documents == 0)) return;
  if (a.k_scales.data) return attention_quantized(target, a, scratch);
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (a.D == 64) launch_attention<T, 64>(target, a, scratch);
      else launch_attention<T, 128>(target, a, scratch);
    }
  });
}

}  // namespace llama_fast::cuda
