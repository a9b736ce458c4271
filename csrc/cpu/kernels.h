// The table of kernels of one instruction set.
#pragma once

#include <cstdint>

#include "../args.h"

namespace llama_fast {

// For measuring the machine itself; each uses what it needs.
struct RooflineArgs {
  const void* source;  // aligned to 64 bytes
  void* target;        // as large as source
  int64_t bytes;       // a multiple of 64
  int64_t steps;       // of a loop that only computes
  int64_t threads;
  float* sink;         // one for each thread
};

struct KernelTable {
  void (*attention)(const AttentionArgs&);
  void (*attention_backward)(const AttentionBackwardArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  void (*rms_norm_backward)(const RmsNormBackwardArgs&);
  void (*add_rms_norm)(const AddRmsNormArgs&);
  void (*adamw)(const AdamwArgs&);
  void (*swiglu)(const SwigluArgs&);
  void (*swiglu_backward)(const SwigluBackwardArgs&);
  void (*rope)(const RopeArgs&);
  void (*kv_append)(const KvAppendArgs&);
  void (*gemv)(const LinearArgs&);
  void (*linear_quantized)(const LinearQuantizedArgs&);
  void (*gemm)(const GemmArgs&);
  void (*read_memory)(const RooflineArgs&);
  void (*copy_memory)(const RooflineArgs&);
  void (*multiply_add_f32)(const RooflineArgs&);
  void (*multiply_add_bf16)(const RooflineArgs&);
  int lanes;        // floats of a vector
  bool bf16_pairs;  // an instruction multiplies pairs of bf16
  int64_t f32_flops, bf16_flops;  // of a step of multiply_add_f32 and multiply_add_bf16
};

// Defined by table.cpp, once for each instruction set that the build has.
namespace scalar { extern const KernelTable kernels; }
namespace avx2 { extern const KernelTable kernels; }
namespace avx_vnni { extern const KernelTable kernels; }
namespace avx512 { extern const KernelTable kernels; }
namespace avx512_bf16 { extern const KernelTable kernels; }
namespace amx { extern const KernelTable kernels; }

}  // namespace llama_fast
