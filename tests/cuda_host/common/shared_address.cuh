// The twin of csrc/cuda/common/shared_address.cuh on the host.
#pragma once

#include <cuda_runtime.h>

namespace llama_fast::cuda {

inline uint32_t shared_address(const void* p) {
  return cuda_host::SHARED_WINDOW +
         static_cast<uint32_t>(static_cast<const unsigned char*>(p) - cuda_host::shared_bytes());
}

}  // namespace llama_fast::cuda
