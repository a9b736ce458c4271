// The twin of csrc/cuda/common/warpgroup.cuh on the host.
#pragma once

#include <cuda_runtime.h>

#include "../async.h"

namespace llama_fast::cuda {

constexpr int WARPGROUP = cuda_host::WARPGROUP;

// Registers are not counted here, but all threads of the warpgroup must come.
template <int COUNT> void shrink_to_registers(CUDA_HOST_CALLED_FROM) {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("setmaxnreg.dec"), nullptr, nullptr);
}
template <int COUNT> void grow_to_registers(CUDA_HOST_CALLED_FROM) {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("setmaxnreg.inc"), nullptr, nullptr);
}

inline void named_barrier_sync(int barrier, int threads, CUDA_HOST_CALLED_FROM) {
  cuda_host::async::arrive_at(CUDA_HOST_HERE("bar.sync"), barrier, threads, true);
}
inline void named_barrier_arrive(int barrier, int threads, CUDA_HOST_CALLED_FROM) {
  cuda_host::async::arrive_at(CUDA_HOST_HERE("bar.arrive"), barrier, threads, false);
}

inline void fence_proxy_async() { cuda_host::fence_proxy_async(); }

}  // namespace llama_fast::cuda
