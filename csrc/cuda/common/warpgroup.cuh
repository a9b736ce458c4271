// What warpgroups, four warps each, agree on: registers, barriers of some of a block's threads, and
// when the matrix instructions and bulk copies see what threads have stored. For sm_90a.
#pragma once

#include <cuda_runtime.h>

namespace llama_fast::cuda {

constexpr int WARPGROUP = 128;

// Give registers of the warpgroup's threads back, or take such as others have given.
template <int COUNT> __device__ __forceinline__ void shrink_to_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void grow_to_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Barriers 1 … 15 of a block, each of so many threads, in whole warps: who meets waits for all that
// meet or arrive, who arrives does not wait.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread has stored to shared memory is seen by matrix instructions and bulk copies that
// begin after a barrier that follows.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace llama_fast::cuda
