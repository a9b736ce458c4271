// The twin of csrc/cuda/common/launch.cuh on the host: a launch runs the kernel before it returns.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../../csrc/cuda/kernels.h"

namespace llama_fast::cuda {

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool overlaps = false;
};

template <class T> inline T& shared_memory() {
  return *reinterpret_cast<T*>(cuda_host::shared_bytes());
}

template <class... Params>
void launch(const Target& target, const Launch& how, void (*kernel)(Params...),
            std::decay_t<Params>... args) {
  cuda_host::run(how.kernel, how.grid, how.block, how.shared_bytes, [&] { kernel(args...); },
                 target.overlap && how.overlaps);
}

}  // namespace llama_fast::cuda
