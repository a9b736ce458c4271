// What the launchers and Python ask about a device.
#include <common/launch.cuh>

namespace llama_fast::cuda {

const char* device_type() { return "cuda"; }

int multiprocessors(int device) {
  const Launch asked{"none, its device is asked for its multiprocessors", {}, {}};
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), asked);
  return count;
}

}  // namespace llama_fast::cuda
