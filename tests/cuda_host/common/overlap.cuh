// The twin of csrc/cuda/common/overlap.cuh on the host, where one kernel runs after another: what is
// checked is that one which is launched to overlap waits.
#pragma once

#include <cuda_runtime.h>

namespace llama_fast::cuda {

inline void wait_for_kernel_before() { cuda_host::waited_for_kernel_before(); }
inline void let_next_kernel_begin() {}

}  // namespace llama_fast::cuda
