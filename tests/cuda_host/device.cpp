// The twin of csrc/cuda/device.cu on the host, and what the tests ask of the machine.
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/versions.h"
#include "machine.h"

namespace llama_fast::cuda {

const char* device_type() { return "cpu"; }

// Few, so that blocks that share work get several shares each.
int multiprocessors(int) { return 3; }

int runtime_version() { return 0; }
int driver_version() { return 0; }

}  // namespace llama_fast::cuda

// For ctypes.
extern "C" {
__attribute__((visibility("default"))) void cuda_host_set_order(int order) {
  cuda_host::order = order;
}
__attribute__((visibility("default"))) void cuda_host_set_grid_limit(unsigned limit) {
  cuda_host::grid_limit = limit;
}
__attribute__((visibility("default"))) const char* cuda_host_take_launches() {
  static std::string taken;
  taken = cuda_host::take_launches();
  return taken.c_str();
}
}
