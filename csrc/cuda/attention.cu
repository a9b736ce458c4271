// o = softmax(scale · q·kᵀ) v with grouped heads. The launcher takes one of two kernels: few_queries.cuh
// where 16 rows hold all the queries of a KV head, many_queries.cuh otherwise.
#include "attention/few_queries.cuh"
#include "attention/many_queries.cuh"

namespace llama_fast::cuda {

// Every architecture that is served has this much for a block: sm_86, 89 and 120 have no more.
constexpr size_t MOST_SHARED = 99 * 1024;

template <class T, int D> static void launch_few(const Target& target, const AttentionArgs& a) {
  using Shared = FewQueriesShared<T, D>;
  static_assert(sizeof(Shared) <= MOST_SHARED, "fits every GPU");
  const Launch how{"attention_few",
                   {unsigned(a.splits), unsigned(a.K), unsigned(a.B)},
                   {FEW_WARPS * WARP},
                   sizeof(Shared)};
  launch(target, how, attention_few_kernel<T, D>, a);
}

template <class T, int D, int WARPS>
static void launch_many(const Target& target, const AttentionArgs& a) {
  using Shared = ManyQueriesShared<T, D>;
  static_assert(sizeof(Shared) <= MOST_SHARED, "fits every GPU");
  const int64_t rows = a.T * (a.H / a.K);
  const Launch how{"attention_many",
                   {unsigned(a.K), unsigned(ceil_div(rows, WARPS * 16)), unsigned(a.B)},
                   {WARPS * WARP},
                   sizeof(Shared)};
  launch(target, how, attention_many_kernel<T, D, WARPS>, a);
}

template <class T, int D> static void launch_attention(const Target& target, const AttentionArgs& a) {
  const int64_t rows = a.T * (a.H / a.K);
  if (rows <= FEW_ROWS) launch_few<T, D>(target, a);
  else if (rows <= 64) launch_many<T, D, 4>(target, a);
  else launch_many<T, D, 8>(target, a);
}

int64_t attention_part_bytes(int64_t D) {
  return D == 64 ? sizeof(RowPart<64>) : sizeof(RowPart<128>);
}

void attention(const Target& target, const AttentionArgs& a) {
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (a.D == 64) launch_attention<T, 64>(target, a);
      else launch_attention<T, 128>(target, a);
    }
  });
}

}  // namespace llama_fast::cuda
