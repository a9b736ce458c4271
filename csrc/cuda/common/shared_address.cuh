// The addresses of shared memory that PTX instructions take.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llama_fast::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace llama_fast::cuda
