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

}  // namespace llama_fast::cuda
