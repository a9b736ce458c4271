// Every CUDA kernel's launcher.
//
// No torch, no Python, no CUDA header. A launcher returns when its kernels are in the stream; it throws
// LaunchError when they cannot be put there.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../args.h"

namespace llama_fast::cuda {

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

void rms_norm(const Target&, const RmsNormArgs&);
void add_rms_norm(const Target&, const AddRmsNormArgs&);
void rms_norm_backward(const Target&, const RmsNormBackwardArgs&);
void add_rms_norm_backward(const Target&, const RmsNormBackwardArgs&);
void swiglu(const Target&, const SwigluArgs&);
void swiglu_backward(const Target&, const SwigluBackwardArgs&);
void rope(const Target&, const RopeArgs&);
void kv_append(const Target&, const KvAppendArgs&);

// bf16 or f16, and at most 16 rows of x. C_in is a multiple of 8 (and less than 8 beyond that of a
// quantised weight), and x's rows and the weight are aligned to 16 bytes.
void linear(const Target&, const LinearArgs&);
void linear_swiglu(const Target&, const LinearArgs&);
void linear_quantized(const Target&, const LinearQuantizedArgs&);
void linear_swiglu_quantized(const Target&, const LinearQuantizedArgs&);

// What attention needs here besides its arguments.
struct AttentionScratch {
  // For at most 16 queries to a KV head: blocks that share its keys; if more than one, scratch of
  // attention_partial_bytes(D) for each of (B, K, splits, T · H / K), and counts (B, K) that are zero
  // before and after.
  int64_t splits;
  void* partials;
  int* arrived;
  // For more of them against keys and values in 8 bits: scratch of (rows, K, S, D) numbers of the dtype
  // each, for as many rows of the batch at a time.
  void *k, *v;
  int64_t rows;
  bool warpgroups;  // of more queries, those of an sm_90 go to the kernel with wgmma, if it can
};

// bf16 or f16, D 64 or 128; rows of q, k and v aligned to 16 bytes. Keys and values in 8 bits have no lse.
void attention(const Target&, const AttentionArgs&, const AttentionScratch&);
int64_t attention_partial_bytes(int64_t D);

}  // namespace llama_fast::cuda
