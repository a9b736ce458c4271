// Programmatic dependent launch, for sm_90 and later: a kernel that is launched to overlap may begin
// while the one before it in the stream still runs. Elsewhere, and where a launch does not ask for it,
// these do nothing. CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
#pragma once

#include <cuda_runtime.h>

namespace llama_fast::cuda {

// What the kernels before have written is there, and what they read may be overwritten. Every kernel
// that overlaps calls this before it touches anything but weights.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin when all blocks have said so or ended: it finds room beside this one, and
// has its first loads of weights under way.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace llama_fast::cuda
