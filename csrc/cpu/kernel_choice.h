// What chooses a kernel, or whether to share it among threads: every threshold of the CPU kernels.
// All were measured; see docs/log.md.
#pragma once

#include <cstdint>

namespace llama_fast {

// linear: rows of x up to which GEMV, which reads the weight once and is limited by that, is no slower
// than torch's product; and than our own GEMM.
constexpr int64_t GEMV_ROWS = 16, GEMV_ROWS_BESIDE_GEMM = 28;
// Rows from which our own GEMM is the faster one for the gradients.
constexpr int64_t GEMM_GRADIENT_ROWS = 8;
// linear by quantised weights: rows from which tile registers (AMX), which turn weights into bytes
// first, are the faster ones; there are fewer weights of 8 bits to a cache line.
inline int64_t quantized_tile_rows(int bits) { return bits == 4 ? 13 : 25; }

// attention: query heads of a KV head up to which a row of the batch is decoded (split-KV). Packing
// keys and values, as prefill does, pays beyond.
constexpr int64_t DECODE_ROWS = 16;
// Keys of a split. A query's sums begin anew at each, whichever way it takes: see splits.h.
constexpr int64_t SPLIT_KEYS = 1024;

// Multiply-adds of attention that make up for waking a thread.
constexpr int64_t THREAD_WORK = 1 << 18;
// Multiply-adds of a product that one thread makes alone, in some 30 µs: on a busy machine, to wait for
// another takes far longer. And of each thread's share of a larger one.
constexpr int64_t PRODUCT_ON_ONE_THREAD = 1 << 19, PRODUCT_SHARE = 1 << 16;
// Blocks of rows that each make a part of dw in the backward of a norm: a block has 32 rows at least,
// and the parts, of C floats each, stay in a cache.
inline int64_t norm_partials(int64_t rows) {
  constexpr int64_t ROWS = 32, MOST = 64;
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  return blocks < MOST ? blocks : MOST;
}

// Elements of the elementwise ops that are worth a thread.
constexpr int64_t ELEMENTS_OF_A_THREAD = 1 << 14;

// Which product serves a linear. own_gemm: those of many rows are ours, not torch's.
enum class Product { gemv, gemm, torch };

inline int64_t gemv_rows(bool own_gemm) { return own_gemm ? GEMV_ROWS_BESIDE_GEMM : GEMV_ROWS; }
inline Product product_of(int64_t rows, bool own_gemm) {
  return rows <= gemv_rows(own_gemm) ? Product::gemv : own_gemm ? Product::gemm : Product::torch;
}
inline Product product_of_gradient(int64_t rows, bool own_gemm) {
  return own_gemm && rows >= GEMM_GRADIENT_ROWS ? Product::gemm : Product::torch;
}

}  // namespace llama_fast
