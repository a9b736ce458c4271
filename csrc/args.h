// The arguments of every kernel, of the CPU and of CUDA alike.
//
// Pointers and sizes only: no torch, no Python, no CUDA header. Strides count elements, never bytes.
// Dims are the legend of docs/shapes.md.
#pragma once

#include <cstdint>

namespace llama_fast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Rows of C elements, contiguous inside, at up to three outer dims of any stride.
struct Rows {
  int64_t n0, n1, n2;
  int64_t stride0, stride1, stride2;

  int64_t count() const { return n0 * n1 * n2; }
  int64_t offset(int64_t row) const {
    const int64_t i2 = row % n2, i1 = row / n2 % n1, i0 = row / n2 / n1;
    return i0 * stride0 + i1 * stride1 + i2 * stride2;
  }
};

// Outer strides of a (B, T, heads, D) tensor, whose last dim has stride 1, or of one of (B, T, heads).
struct HeadStrides { int64_t b, t, h; };

// A (B, T, heads, D) tensor, contiguous in D; in a cache T counts the slots.
struct Heads {
  void* data;
  HeadStrides stride;

  // The first head of token t of row b.
  template <class T> T* at(int64_t b, int64_t t) const {
    return static_cast<T*>(data) + b * stride.b + t * stride.t;
  }
};

// A float for each head's vector in a cache of 8 bits, (B, S, heads); null where it is not quantised.
struct HeadScales {
  float* data;
  HeadStrides stride;
};

struct RmsNormArgs {
  DType dtype;
  const void* x;       // rows of C
  const void* weight;  // (C,)
  void* y;             // (N, C) contiguous
  Rows rows;
  int64_t C;
  float eps;
};

struct AddRmsNormArgs {
  DType dtype;
  const void* x;         // rows of C
  const void* residual;  // rows of C
  const void* weight;    // (C,)
  void* y;               // (N, C) contiguous
  void* total;           // (N, C) contiguous: x + residual
  Rows x_rows, residual_rows;
  int64_t C;
  float eps;
};

// The backward of both norms.
struct RmsNormBackwardArgs {
  DType dtype;
  const void* grad;        // rows of C: the gradient of y
  const void* grad_total;  // rows of C: the gradient of x itself, added to dx; null for none
  const void* x;           // rows of C
  const void* weight;      // (C,)
  void* dx;                // (N, C) contiguous
  void* dw;                // (C,)
  void* dw_partials;       // (partials, C) float, or double for float32 rows: each block's dw; scratch
  int64_t partials;        // blocks that share the rows, at most N
  Rows grad_rows, grad_total_rows, x_rows;
  int64_t C;
  float eps;
};

// One step of n elements, with what the step's numbers come to.
struct AdamwArgs {
  DType dtype;             // of param: f32 or bf16
  DType grad_dtype;        // f32 or bf16
  void* param;             // (n,)
  const void* grad;        // (n,)
  void *exp_avg, *exp_avg_sq;              // (n,) float; int8 and uint8 where there are scales
  float *exp_avg_scale, *exp_avg_sq_scale;  // (⌈n / 256⌉,), or null
  int64_t n;
  float grad_scale;
  float towards_grad;         // 1 - beta1
  float beta2, of_square;     // and 1 - beta2
  float correction;           // 1 / sqrt(1 - beta2^step)
  float eps;
  float decay;                // 1 - lr · weight_decay
  float step_size;            // lr / (1 - beta1^step)
  bool stochastic;            // rounding, of what is not float, by random bits of these keys
  uint32_t param_key[2], moments_key[2];
};

struct SwigluArgs {
  DType dtype;
  const void* gate;  // rows of F
  const void* up;    // rows of F
  void* h;           // (N, F) contiguous
  Rows gate_rows, up_rows;
  int64_t F;
};

struct SwigluBackwardArgs {
  DType dtype;
  const void* grad;  // rows of F
  const void* gate;  // rows of F
  const void* up;    // rows of F
  void* d_gate;      // (N, F) contiguous
  void* d_up;        // (N, F) contiguous
  Rows grad_rows, gate_rows, up_rows;
  int64_t F;
};

struct RopeArgs {
  DType dtype;
  Heads q, k;
  void* q_out;             // (B, T, H, D) contiguous
  void* k_out;             // (B, T, K, D) contiguous
  const float *cos, *sin;  // (B, T, D/2)
  int64_t cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t;
  int64_t B, T, H, K, D;
  bool interleaved;
};

struct KvAppendArgs {
  DType dtype;
  Heads q, k, v;
  void* q_out;                     // (B, T, H, D) contiguous
  const float *cos, *sin;          // (P, D/2)
  int64_t cos_stride, sin_stride;
  Heads k_cache, v_cache;          // (B, S, K, D) of dtype; or of int8, where there are scales
  HeadScales k_scales, v_scales;   // (B, S, K)
  const int64_t* lengths;          // (B,)
  int64_t lengths_stride;
  int64_t B, T, S, P, H, K, D;
  bool interleaved;
};

// A scale of scores, |scale| = |unit| · factor, so that an exponent is as exact as its score. A score times
// `unit` is not rounded, so the largest of them less itself is 0, and the difference times `rest` is an
// exponent of two. Of scores times the whole scale the largest would be rounded, and beyond 2^30 by so
// much that its own exponent is more than a float holds.
struct ScoreScale {
  float unit;    // a power of two with the scale's sign, or 0
  float factor;  // in [1, 2)
  float rest;    // factor · log2 e
};

struct AttentionArgs {
  DType dtype;
  Heads q;                        // (B, T, H, D)
  Heads k, v;                     // (B, S, K, D) of dtype; or of int8, where there are scales
  HeadScales k_scales, v_scales;  // (B, S, K)
  void* o;                        // (B, T, H, D) contiguous
  void* lse;                      // (B, H, T) contiguous, log of the sum of exp(score), or null; float,
                                  // or double beside f32 on the CPU
  int64_t lse_stride;             // of lse, from head to head
  const int64_t* lengths;         // (B,), each at most S, or null for S
  const int32_t* cu_seqlens;      // (documents + 1,), from 0 to T: where documents packed in the one row
  int64_t documents;              // end, B = 1 and S = T; or null
  int64_t B, T, S, H, K, D;
  bool causal;
  ScoreScale scale;
  bool batch_invariant = false;  // few queries are computed in the order of many, also where that is slower
};

// The backward of attention: of the forward pass q, k, v, lse, where, and how they are; o is beside them,
// since it may have strides, and is read only.
struct AttentionBackwardArgs {
  AttentionArgs forward;
  Heads grad;  // (B, T, H, D): the gradient of o
  Heads o;     // (B, T, H, D)
  void* dq;    // (B, T, H, D) contiguous
  void* dk;    // (B, S, K, D) contiguous
  void* dv;    // (B, S, K, D) contiguous
};

// How a CPU has a weight fetched that few rows of x meet: tiles of some rows in step, each row (of a
// quantised one, each block of rows) fetched on its own; or a stream, what comes next in the order of its
// addresses, into the second cache. Both sum in the same order.
enum class Walk { tiles, stream };

struct LinearArgs {
  DType dtype;
  const void* x;       // M rows of C_in
  const void* weight;  // (C_out, C_in) contiguous; of linear_swiglu (2 C_out, C_in), gate and then up
  void* y;             // (M, C_out) contiguous
  Rows rows;
  int64_t C_in, C_out;
  Walk walk = Walk::tiles;
};

// A weight of 8-bit or 4-bit integers; its layout is drawn in docs/ops/linear.md.
struct QuantizedWeight {
  const uint8_t* qdata;  // (blocks, columns · bits / 8, 16)
  const void* scales;    // float16 (blocks, groups, 16)
  const void* minima;    // float16 as scales, or null: qdata stands for levels
  int64_t C_in, C_out, group_size;
  int bits;
};

struct LinearQuantizedArgs {
  DType dtype;
  const void* x;           // M rows of C_in
  QuantizedWeight weight;
  void* y;                 // (M, C_out) contiguous
  Rows rows;
  Walk walk = Walk::tiles;
};

// One side of a matrix product: vectors of K elements. They are rows of memory; or columns of it,
// where `transposed`, and the K rows of memory then have one stride, rows.stride2; or the columns
// of a quantised weight.
struct MatrixSide {
  const void* data;
  Rows rows;
  bool transposed;
  const QuantizedWeight* quantized = nullptr;
};

// out[r][l] = Σ_k rows[r][k] · lanes[l][k]
struct GemmArgs {
  DType dtype;
  MatrixSide rows;   // R of them
  MatrixSide lanes;  // L of them
  void* out;         // (R, L) contiguous; (L, R) where transposed
  bool out_transposed;
  int64_t R, L, K;   // K > 0
};

}  // namespace llama_fast
