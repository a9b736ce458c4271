// What a block of attention works on: the query heads of one KV head of one row of the batch, or of one
// of the documents packed in the only row.
//
// The T·G queries that share a KV head are packed as rows of one matrix: row r is query r / G of query
// head (KV head · G + r % G). Keys and values are then read once for all of them.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"

namespace llama_fast::cuda {

// Queries and output are of T; keys and values are held as Cached, T itself or integers of 8 bits.
template <class T, class Cached = T> struct Problem {
  const T* q;  // of this row or document and KV head, as all that follows
  const Cached *k, *v;
  int tokens, G, H;
  int64_t q_stride_t, q_stride_h, k_stride, v_stride;
  int length;  // valid keys, at most S
  int shift;   // query t sees the keys below t + shift, if causal
  bool causal;
  int row, first, row_tokens;  // of the batch, the first of its tokens there, and T

  // b: a row of the batch, or a document.
  __device__ __forceinline__ Problem(const AttentionArgs& a, int kv, int b)
      : q(static_cast<const T*>(a.q.data) + b * a.q.stride.b + kv * (a.H / a.K) * a.q.stride.h),
        k(static_cast<const Cached*>(a.k.data) + b * a.k.stride.b + kv * a.k.stride.h),
        v(static_cast<const Cached*>(a.v.data) + b * a.v.stride.b + kv * a.v.stride.h),
        tokens(int(a.T)),
        G(int(a.H / a.K)),
        H(int(a.H)),
        q_stride_t(a.q.stride.t),
        q_stride_h(a.q.stride.h),
        k_stride(a.k.stride.t),
        v_stride(a.v.stride.t),
        causal(a.causal),
        row(b),
        first(0),
        row_tokens(int(a.T)) {
    if (a.cu_seqlens) {  // inside of the row, whatever was given
      first = min(max(a.cu_seqlens[b], 0), row_tokens);
      tokens = length = min(max(a.cu_seqlens[b + 1], first), row_tokens) - first;
      shift = 1;
      row = 0;
      q += first * q_stride_t - b * a.q.stride.b;
      k += first * k_stride - b * a.k.stride.b;
      v += first * v_stride - b * a.v.stride.b;
      return;
    }
    // Below -T no query sees a key, whatever was given; and it may not fit into an int.
    const int64_t given = a.lengths ? max(a.lengths[b], -a.T) : a.S;
    length = int(min(given, a.S));
    shift = int(given - a.T) + 1;
  }

  __device__ __forceinline__ int rows() const { return tokens * G; }

  // Row r sees the keys below this; none where there is no such row.
  __device__ __forceinline__ int limit(int r) const {
    if (r >= rows()) return 0;
    const int end = causal ? min(length, r / G + shift) : length;
    return max(end, 0);
  }

  __device__ __forceinline__ const T* query(int r) const {
    return r < rows() ? q + r / G * q_stride_t + r % G * q_stride_h : nullptr;
  }

  // Where row r of the output lies: (b, t, h) of (B, T, H), and of (B, H, T).
  __device__ __forceinline__ int64_t out_row(int r, int kv) const {
    return (int64_t(row) * row_tokens + first + r / G) * H + kv * G + r % G;
  }
  __device__ __forceinline__ int64_t lse_at(int r, int kv) const {
    return (int64_t(row) * H + kv * G + r % G) * row_tokens + first + r / G;
  }
};

}  // namespace llama_fast::cuda
