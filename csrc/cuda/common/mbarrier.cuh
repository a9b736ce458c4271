// Barriers in shared memory, on which threads and bulk copies arrive; for sm_90 and later. PTX ISA,
// "mbarrier".
//
// A barrier's phases follow one another, numbered from 0. A phase ends when all its arrivals have come
// and all the bytes that they said to expect. A wait names its phase by the parity of its number, and
// goes on at once where that phase is over; before phase 0 ends, "phase -1", of parity 1, is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared_address.cuh"

namespace llama_fast::cuda {

struct alignas(8) Mbarrier { uint64_t state; };

// By one thread, once for each barrier; then publish_mbarriers() by it and __syncthreads() by all.
__device__ __forceinline__ void start_mbarrier(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void publish_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives, and lets the phase wait for that many bytes of bulk copies.
__device__ __forceinline__ void arrive_expecting(Mbarrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void wait_for_phase(Mbarrier& barrier, int parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!over);
}

}  // namespace llama_fast::cuda
