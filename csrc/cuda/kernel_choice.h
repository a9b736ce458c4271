// What chooses a kernel of an op, or over how many blocks it is split: every threshold of the CUDA
// kernels.
#pragma once

#include <cstdint>

namespace llama_fast::cuda {

// linear: rows of x up to which reading the weight is what takes time (GEMV): two tiles of eight. Of
// more, the product is the vendor's.
constexpr int GEMV_ROWS = 16;

// attention: queries to a KV head that one tile of the matrix instructions holds are decoded (split-KV).
constexpr int DECODE_ROWS = 16;
inline bool is_decode(int64_t T, int64_t H, int64_t K) { return T * (H / K) <= DECODE_ROWS; }

// Keys that are worth a block of their own.
constexpr int64_t SPLIT_KEYS = 128;
// Blocks that share the keys of a KV head when they are decoded: as many as make one wave of two blocks
// to a multiprocessor, for a second wave would cost as much as the first.
inline int64_t kv_splits(int64_t B, int64_t K, int64_t S, int64_t multiprocessors) {
  const int64_t heads = B * K > 1 ? B * K : 1, most = (S + SPLIT_KEYS - 1) / SPLIT_KEYS;
  const int64_t wave = 2 * multiprocessors / heads, splits = wave < most ? wave : most;
  return splits > 1 ? splits : 1;
}

// Rows of queries up to which a prefill has blocks of four warps; beyond, of eight.
constexpr int SMALL_PREFILL_ROWS = 64;

}  // namespace llama_fast::cuda
