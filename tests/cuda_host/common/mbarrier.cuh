// The twin of csrc/cuda/common/mbarrier.cuh on the host.
#pragma once

#include <cuda_runtime.h>

#include "../async.h"

namespace llama_fast::cuda {

struct alignas(8) Mbarrier { uint64_t state; };

inline void start_mbarrier(Mbarrier& barrier, int arrivals) {
  cuda_host::async::start_mbarrier(&barrier, arrivals);
}
inline void publish_mbarriers() {}
inline void arrive(Mbarrier& barrier) { cuda_host::async::arrive(&barrier, 0); }
inline void arrive_expecting(Mbarrier& barrier, int bytes) {
  cuda_host::async::arrive(&barrier, bytes);
}
inline void wait_for_phase(Mbarrier& barrier, int parity, CUDA_HOST_CALLED_FROM) {
  cuda_host::async::wait_for_phase(CUDA_HOST_HERE("mbarrier.try_wait"), &barrier, parity);
}

}  // namespace llama_fast::cuda
