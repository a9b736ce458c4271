// csrc/cuda/common/launch.cuh and device.cu on a runtime that fails on demand; for test_launch.py.
#include "../../../csrc/cuda/common/launch.cuh"
#include "../../../csrc/cuda/device.cu"

#include "../faults.h"

Runtime runtime;

static void kernel(int) {}
static void older_kernel(long) {}

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Launches on `device`, the current one being 0, where `contexts` has a bit for each device in use; returns
// the error's text, or nothing. The call `failing` fails when it has not so often: `calls_before`.
EXPORTED const char* try_launch(const char* failing, int calls_before, int device, unsigned contexts,
                                size_t shared_bytes, bool overlap, bool overlaps,
                                int ptx_version) {
  using namespace llama_fast::cuda;
  runtime = {};
  runtime.failing = failing;
  runtime.calls_before = calls_before;
  runtime.contexts = contexts;
  runtime.ptx_version = ptx_version;
  const Launch how{"some_fwd", {7, 2}, {64}, shared_bytes, overlaps};
  return caught([&] {
    if (ptx_version >= 90) launch({device, nullptr, overlap}, how, kernel, 1);
    else launch({device, nullptr, overlap}, how, older_kernel, 1L);
  });
}
// Asks what is known of device and driver; returns the error's text, or nothing.
EXPORTED const char* try_questions(const char* failing) {
  runtime = {};
  runtime.failing = failing;
  return caught([] {
    using namespace llama_fast::cuda;
    const int driver = runtime.failing == "cudaDriverGetVersion" ? 0 : 12040;
    if (multiprocessors(0) != 7 || runtime_version() != 13020 || driver_version() != driver)
      throw LaunchError("not what the runtime says");
  });
}
EXPORTED int last_error() { return runtime.last; }
EXPORTED int current_device() { return runtime.device; }
EXPORTED unsigned contexts() { return runtime.contexts; }
EXPORTED int asked_for_shared_bytes() { return int(runtime.shared_bytes); }
EXPORTED int launches() { return runtime.launches; }
EXPORTED int overlapping_launches() { return runtime.overlapping; }
