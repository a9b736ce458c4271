// What the launchers and Python ask about a device.
#include <common/launch.cuh>

#include "versions.h"

namespace llama_fast::cuda {

const char* device_type() { return "cuda"; }

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "the number of the device's multiprocessors");
  return count;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "the version of CUDA's runtime");
  return version;
}

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  (void)cudaGetLastError();  // a driver that is too old may say no more than that
  return 0;
}

}  // namespace llama_fast::cuda
