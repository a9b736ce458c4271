// The twin of csrc/cuda/common/pdl.cuh on the host, where one kernel runs after another: what is
// checked is that one which is launched to overlap waits.
#pragma once

#include <cuda_runtime.h>

namespace llama_fast::cuda {

inline void griddepcontrol_wait() { cuda_host::waited_for_griddepcontrol(); }
inline void griddepcontrol_launch_dependents() {}

}  // namespace llama_fast::cuda
