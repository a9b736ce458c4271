// What both kv_appends have in common: which token a block has, where its heads lie, and its queries.
#pragma once

#include "../common/rotate.cuh"

namespace llama_fast::cuda {

// blockIdx.x is a token: t of row b, at the position and in the slot lengths[b] - T + t. It is stored
// unless that is negative, or beyond the cache or the tables. A row of no tokens or less stores none,
// and a length near the least integer must not wrap around.
struct Token {
  int64_t b, t, position;
  bool stored;

  __device__ __forceinline__ Token(const int64_t* lengths, int64_t stride, int tokens, int64_t most)
      : b(int(blockIdx.x) / tokens),
        t(int(blockIdx.x) % tokens),
        position(max(lengths[b * stride], int64_t(0)) - tokens + t),
        stored(position >= 0 && position < most) {}
};

template <class T>
__device__ __forceinline__ T* head(const Heads& heads, int64_t b, int64_t t, int64_t h) {
  return static_cast<T*>(heads.data) + b * heads.stride.b + t * heads.stride.t +
         h * heads.stride.h;
}

// The pairs p … p + COUNT - 1 of query head h: rotated, or 0 where the token is not stored.
template <class T, int COUNT>
__device__ __forceinline__ void put_query(const Token& token, const Heads& q, T* q_out, int64_t h,
                                          const float* cos, const float* sin, int64_t p, int64_t H,
                                          int64_t D, bool interleaved) {
  T* y = q_out + (blockIdx.x * H + h) * D;
  if (token.stored) {
    rotate<T, COUNT>(head<T>(q, token.b, token.t, h), y, cos, sin, p, D, interleaved);
  } else {
    Pack<T, COUNT> zeros;
    for (int j = 0; j < COUNT; ++j) zeros.v[j] = from_float<T>(0.0f);
    store(y + p, zeros);
    store(y + p + D / 2, zeros);
  }
}

// Of kv_append_quantized.cu, where the cache has 8 bits.
void kv_append_quantized(const Target&, const KvAppendArgs&);

// Whether all that is read and written lies in whole vectors, those of the caches too.
template <class T> bool is_wide(const KvAppendArgs& a) {
  constexpr int VEC = VECTOR<T>;
  return a.D / 2 % VEC == 0 && whole(VEC, a.q) && whole(VEC, a.k) && whole(VEC, a.v) &&
         whole(VEC, a.k_cache) && whole(VEC, a.v_cache) &&
         aligned({a.q_out, a.cos, a.sin}) && whole(4, {a.cos_stride, a.sin_stride});
}

}  // namespace llama_fast::cuda
