// What the launchers and Python ask about a device.
#include <common/launch.cuh>

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
  check(cudaDriverGetVersion(&version), "the version of CUDA's driver");
  return version;
}

}  // namespace llama_fast::cuda
