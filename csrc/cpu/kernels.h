// Every CPU kernel's arguments, and the table of kernels of one instruction set.
//
// Pointers and sizes only: no torch, no Python. Strides count elements, never bytes. Dims are the
// legend of docs/shapes.md.
#pragma once

#include <cstdint>

namespace llama_fast {

struct f16;

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

struct RmsNormArgs {
  DType dtype;
  const void* x;       // rows of C
  const void* weight;  // (C,)
  void* y;             // (N, C) contiguous
  Rows rows;
  int64_t C;
  float eps;
};

// Outer strides of a (B, T, heads, D) tensor; the last dim has stride 1.
struct HeadStrides { int64_t b, t, h; };

struct AttentionArgs {
  DType dtype;
  const void* q;           // (B, T, H, D)
  const void* k;           // (B, S, K, D)
  const void* v;           // (B, S, K, D)
  void* o;                 // (B, T, H, D) contiguous
  void* lse;               // (B, H, T) contiguous, log of the sum of exp(score), or null; float,
                           // or double beside F32
  const int64_t* lengths;  // (B,), each at most S, or null for S
  int64_t B, T, S, H, K, D;
  HeadStrides q_stride, k_stride, v_stride;
  bool causal;
  float scale;
};

// Keys or values in 8 bits; scales have a head in each place of codes' (B, S, K).
struct QuantizedHeads {
  int8_t* codes;          // (B, S, K, D)
  HeadStrides stride;
  float* scales;          // (B, S, K)
  HeadStrides scale_stride;
};

struct AttentionQuantizedArgs {
  AttentionArgs plain;    // without k, v and lse
  QuantizedHeads k, v;
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

struct SwigluArgs {
  DType dtype;
  const void* gate;  // rows of F
  const void* up;    // rows of F
  void* h;           // (N, F) contiguous
  Rows gate_rows, up_rows;
  int64_t F;
};

// A (B, T, heads, D) tensor; in a cache T counts the slots.
struct Heads {
  void* data;
  int64_t heads;
  HeadStrides stride;

  // The first head of token t of row b.
  template <class T> T* at(int64_t b, int64_t t) const {
    return static_cast<T*>(data) + b * stride.b + t * stride.t;
  }
};

struct RopeArgs {
  DType dtype;
  Heads q, k;
  void* q_out;             // (B, T, H, D) contiguous
  void* k_out;             // (B, T, K, D) contiguous
  const float *cos, *sin;  // (B, T, D/2)
  int64_t cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t;
  int64_t B, T, D;
  bool interleaved;
};

struct KvAppendArgs {
  DType dtype;
  Heads q, k, v;
  void* q_out;             // (B, T, H, D) contiguous
  const float *cos, *sin;  // (P, D/2)
  int64_t cos_stride, sin_stride;
  Heads k_cache, v_cache;  // (B, S, K, D)
  const int64_t* lengths;  // (B,), each at most S and P
  int64_t lengths_stride;
  int64_t B, T, D;
  bool interleaved;

  // Where token t of row b is stored; negative where it is not. A row of no tokens or less stores
  // none, and a length near the least integer must not wrap around.
  int64_t position(int64_t b, int64_t t) const {
    const int64_t length = lengths[b * lengths_stride];
    return (length > 0 ? length : 0) - T + t;
  }
};

struct KvAppendQuantizedArgs {
  KvAppendArgs plain;     // without caches
  QuantizedHeads k_cache, v_cache;
};

struct LinearArgs {
  DType dtype;
  const void* x;       // M <= 28 rows of C_in
  const void* weight;  // (C_out, C_in) contiguous
  void* y;             // (M, C_out) contiguous
  Rows rows;
  int64_t C_in, C_out;
};

struct LinearQuantizedArgs {
  DType dtype;
  const void* x;         // M rows of C_in
  const uint8_t* codes;  // (blocks, columns · bits / 8, 16) as docs/ops/linear_quantized.md draws it
  const f16* scales;     // (blocks, groups, 16)
  const f16* offsets;    // as scales, or null: codes are centred on half their range
  void* y;               // (M, C_out) contiguous
  Rows rows;
  int64_t C_in, C_out, group_size;
  int bits;
};

// One side of a matrix product: vectors of K elements. They are rows of memory; or columns of it,
// where `transposed`, and the K rows of memory then have one stride, rows.stride2.
struct MatrixSide {
  const void* data;
  Rows rows;
  bool transposed;
};

// out[r][l] = Σ_k rows[r][k] · lanes[l][k], for half types
struct MatmulArgs {
  DType dtype;
  MatrixSide rows;   // R of them
  MatrixSide lanes;  // L of them
  void* out;         // (R, L) contiguous; (L, R) where transposed
  bool out_transposed;
  int64_t R, L, K;   // K > 0
};

// For measuring the machine itself; each uses what it needs.
struct CeilingArgs {
  const void* source;  // aligned to 64 bytes
  void* target;        // as large as source
  int64_t bytes;       // a multiple of 64
  int64_t steps;       // of a loop that only computes
  int64_t threads;
  float* sink;         // one for each thread
};

struct KernelTable {
  void (*attention)(const AttentionArgs&);
  void (*attention_quantized)(const AttentionQuantizedArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  void (*add_rms_norm)(const AddRmsNormArgs&);
  void (*swiglu)(const SwigluArgs&);
  void (*rope)(const RopeArgs&);
  void (*kv_append)(const KvAppendArgs&);
  void (*kv_append_quantized)(const KvAppendQuantizedArgs&);
  void (*linear)(const LinearArgs&);
  void (*linear_quantized)(const LinearQuantizedArgs&);
  void (*matmul)(const MatmulArgs&);
  void (*read_memory)(const CeilingArgs&);
  void (*copy_memory)(const CeilingArgs&);
  void (*multiply_add_f32)(const CeilingArgs&);
  void (*multiply_add_bf16)(const CeilingArgs&);
  int lanes;        // floats of a vector
  bool bf16_pairs;  // multiply_add_bf16 is an instruction of its own
};

// Defined by table.cpp, once for each instruction set that the build has.
namespace scalar { extern const KernelTable kernels; }
namespace avx2 { extern const KernelTable kernels; }
namespace avx512 { extern const KernelTable kernels; }
namespace avx512_bf16 { extern const KernelTable kernels; }

}  // namespace llama_fast
