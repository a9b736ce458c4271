// A warp's 16 rows of the output, from the lanes that hold them.
#pragma once

#include <common/ptx.cuh>

#include "problem.cuh"
#include "softmax.cuh"

namespace llama_fast::cuda {

// `row[i]` is row g + 8i of the warp's, and o[n][2i …] its columns 8n + 2t and the next.
template <class T, int D>
__device__ __forceinline__ void write_rows(const AttentionArgs& a, const Problem<T>& problem,
                                           int kv, int b, const int (&row)[2],
                                           const Softmax& softmax, const float (&o)[D / 8][4],
                                           int t) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row[i] >= problem.rows()) continue;
    T* out = static_cast<T*>(a.o) + problem.out_row(row[i], kv) * D;
    const float r = softmax.l[i] == 0.0f ? 0.0f : 1.0f / softmax.l[i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<uint32_t*>(out + n * 8 + 2 * t) =
          pack<T>(o[n][2 * i] * r, o[n][2 * i + 1] * r);
    }
    if (a.lse && t == 0)
      static_cast<float*>(a.lse)[problem.lse_at(row[i], kv)] =
          log_sum(softmax.m[i], softmax.l[i], a.scale);
  }
}

}  // namespace llama_fast::cuda
