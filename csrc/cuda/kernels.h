// Every CUDA kernel's arguments and its launcher.
//
// Pointers and sizes only: no torch, no Python, no CUDA header. Strides count elements, never bytes.
// Dims are the legend of docs/shapes.md. A launcher returns when its kernels are in the stream;
// it throws LaunchError when they cannot be put there.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace llama_fast::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Where to run: a device by its index, and a stream of it (cudaStream_t). `overlap`: kernels of
// decoding may begin before the one before them has ended, where the device can do that; it must then
// write no weights.
struct Target {
  int device;
  void* stream;
  bool overlap = false;
};

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "cuda": the tensors that the launchers take; in the tests' host build, "cpu".
const char* device_type();
// Streaming multiprocessors of a device.
int multiprocessors(int device);

// Outer strides of a (B, T, heads, D) tensor, or of one of (B, T, heads).
struct HeadStrides { int64_t b, t, h; };

// A float for each head's vector in a cache of 8 bits: (B, S, heads).
struct HeadScales {
  float* data;
  HeadStrides stride;
};

// Rows of C elements, contiguous inside, at up to three outer dims of any stride.
struct Rows {
  int64_t n0, n1, n2;
  int64_t stride0, stride1, stride2;

  int64_t count() const { return n0 * n1 * n2; }
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
void rms_norm(const Target&, const RmsNormArgs&);

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
void add_rms_norm(const Target&, const AddRmsNormArgs&);

// The backward of both norms.
struct RmsNormBackwardArgs {
  DType dtype;
  const void* grad;        // rows of C: the gradient of y
  const void* grad_total;  // rows of C: the gradient of x itself, added to dx; null for none
  const void* x;           // rows of C
  const void* weight;      // (C,)
  void* dx;                // (N, C) contiguous
  void* dw;                // (C,)
  void* dw_parts;          // (parts, C) float, or double for float32 rows: each block's dw; scratch
  int64_t parts;           // blocks that share the rows, at most N
  Rows grad_rows, grad_total_rows, x_rows;
  int64_t C;
  float eps;
};
void rms_norm_backward(const Target&, const RmsNormBackwardArgs&);
void add_rms_norm_backward(const Target&, const RmsNormBackwardArgs&);

struct SwigluArgs {
  DType dtype;
  const void* gate;  // rows of F
  const void* up;    // rows of F
  void* h;           // (N, F) contiguous
  Rows gate_rows, up_rows;
  int64_t F;
};
void swiglu(const Target&, const SwigluArgs&);

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
void swiglu_backward(const Target&, const SwigluBackwardArgs&);

// A (B, T, heads, D) tensor, contiguous in D; in a cache T counts the slots.
struct Heads {
  void* data;
  int64_t heads;
  int64_t stride_b, stride_t, stride_h;
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
void rope(const Target&, const RopeArgs&);

struct KvAppendArgs {
  DType dtype;
  Heads q, k, v;
  void* q_out;             // (B, T, H, D) contiguous
  const float *cos, *sin;  // (P, D/2)
  int64_t cos_stride, sin_stride;
  Heads k_cache, v_cache;  // (B, S, K, D)
  const int64_t* lengths;  // (B,)
  int64_t lengths_stride;
  int64_t B, T, S, P, D;
  bool interleaved;
};
void kv_append(const Target&, const KvAppendArgs&);

struct KvAppendQuantizedArgs {
  KvAppendArgs plain;  // its caches hold int8 codes
  HeadScales k_scales, v_scales;
};
void kv_append_quantized(const Target&, const KvAppendQuantizedArgs&);

// C_in is a multiple of 8, and x's rows and the weight are aligned to 16 bytes.
struct LinearArgs {
  DType dtype;         // bf16 or f16
  const void* x;       // M <= 16 rows of C_in
  const void* weight;  // (C_out, C_in) contiguous; of linear_swiglu (2 C_out, C_in), gate and then up
  void* y;             // (M, C_out) contiguous
  Rows rows;
  int64_t C_in, C_out;
};
void linear(const Target&, const LinearArgs&);
void linear_swiglu(const Target&, const LinearArgs&);

// The layout of llama_fast/ops/linear_quantized.py; x as above, C_in less than 8 beyond the weight's.
struct LinearQuantizedArgs {
  DType dtype;          // bf16 or f16
  const void* x;        // M <= 16 rows of C_in
  const void* codes;    // uint8
  const void* scales;   // float16
  const void* offsets;  // float16, or null
  void* y;              // (M, C_out) contiguous
  Rows rows;
  int64_t C_in, C_out, bits, group_size;
};
void linear_quantized(const Target&, const LinearQuantizedArgs&);
void linear_swiglu_quantized(const Target&, const LinearQuantizedArgs&);

struct AttentionArgs {
  DType dtype;             // bf16 or f16
  const void* q;           // (B, T, H, D), D 64 or 128; rows of q, k and v aligned to 16 bytes
  const void* k;           // (B, S, K, D)
  const void* v;           // (B, S, K, D)
  void* o;                 // (B, T, H, D) contiguous
  float* lse;              // (B, H, T), or null
  const int64_t* lengths;  // (B,), each at most S, or null for S
  int64_t B, T, S, H, K, D;
  HeadStrides q_stride, k_stride, v_stride;
  bool causal;
  float scale;
  bool warpgroups;  // of more queries, those of an sm_90 go to the kernel with wgmma, if it can
  // For at most 16 queries to a KV head: blocks that share its keys; if more than one, scratch of
  // attention_part_bytes(D) for each of (B, K, splits, T · H / K), and counts (B, K) that are zero
  // before and after.
  int64_t splits;
  void* parts;
  int* arrived;
};
void attention(const Target&, const AttentionArgs&);
int64_t attention_part_bytes(int64_t D);

struct AttentionQuantizedArgs {
  AttentionArgs plain;  // its k and v are int8 codes, in rows aligned to 16 bytes; no lse
  HeadScales k_scales, v_scales;
  // For more than 16 queries to a KV head: scratch of (wide_rows, K, S, D) numbers of the dtype each,
  // for as many rows of the batch at a time.
  void *wide_k, *wide_v;
  int64_t wide_rows;
};
void attention_quantized(const Target&, const AttentionQuantizedArgs&);

}  // namespace llama_fast::cuda
