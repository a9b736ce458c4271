// How a kernel is put into a stream, and how its block's shared memory is named.
//
// tests/cuda_host/common/launch.cuh is this header's twin on the host: kernels include it in angle
// brackets, and the include path says which one they get.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "../kernels.h"

namespace llama_fast::cuda {

struct Launch {
  const char* kernel;  // its name, for messages
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool overlaps = false;  // the kernel waits for the one before it by itself: see pdl.cuh
};

// The block's shared memory, as large as its launch says; its contents are undefined. Swizzles of bulk
// copies and matrix instructions repeat every 1024 bytes.
template <class T> __device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

inline std::string text(dim3 size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

inline std::string text(const Launch& how) {
  return std::string("kernel ") + how.kernel + " (grid " + text(how.grid) + ", block " +
         text(how.block) + ", " + std::to_string(how.shared_bytes) + " bytes of shared memory)";
}

inline std::string text(const char* words) { return words; }

// Throws for a call of CUDA's that failed: `what` it was for, a launch or some words.
template <class What> void check(cudaError_t error, const What& what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here; must not be found again by someone else
  throw LaunchError(text(what) + ": " + cudaGetErrorName(error) + ": " +
                    cudaGetErrorString(error));
}

// A function of the driver as it was in that version of CUDA, or null where the driver has none. The
// module does not link to the driver, so that it can be imported where there is none.
inline void* driver_function(const char* name, unsigned version, const Launch& how) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &result), how);
#else
  check(cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result), how);
#endif
  return result == cudaDriverEntryPointSuccess ? entry : nullptr;
}

// Whether the process already has the context on the device that the runtime's calls share. Without
// one, cudaSetDevice makes it, which takes some 400 MB of the device's memory.
inline bool has_primary_context(int device, const Launch& how) {
  using GetState = int (*)(int device, unsigned* flags, int* active);  // of CUDA 7 and later
  static const auto get_state =
      reinterpret_cast<GetState>(driver_function("cuDevicePrimaryCtxGetState", 7000, how));
  unsigned flags = 0;
  int active = 1;
  return !get_state || get_state(device, &flags, &active) != 0 || active;
}

// Makes a device current. The one that was current is so again afterwards where it is in use: a model
// on one GPU must make no context on another. torch has the same rule.
class OnDevice {
 public:
  OnDevice(int device, const Launch& how) {
    check(cudaGetDevice(&before_), how);
    if (device == before_) return;
    leave_ = has_primary_context(before_, how);
    check(cudaSetDevice(device), how);
  }
  void leave(const Launch& how) {
    if (std::exchange(leave_, false)) check(cudaSetDevice(before_), how);
  }
  ~OnDevice() {  // where it was not left, an error is on its way, and says more than a second one
    if (leave_ && cudaSetDevice(before_) != cudaSuccess) (void)cudaGetLastError();
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
  bool leave_ = false;
};

// Whether a kernel may begin before the one in front of it has ended: its code must have been made for
// sm_90 or later, for else it has no wait.
inline bool can_overlap(int device, const void* kernel, const Launch& how) {
  static std::map<std::pair<int, const void*>, bool> known;
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), how);
  return known[{device, kernel}] = attributes.ptxVersion >= 90;
}

// A kernel may use this much shared memory without asking.
constexpr size_t SHARED_WITHOUT_ASKING = 48 * 1024;

template <class... Params>
void launch(const Target& target, const Launch& how, void (*kernel)(Params...),
            std::decay_t<Params>... args) {
  OnDevice current(target.device, how);
  if (how.shared_bytes > SHARED_WITHOUT_ASKING) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.shared_bytes)),
          how);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(target.stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (target.overlap && how.overlaps &&
      can_overlap(target.device, reinterpret_cast<const void*>(kernel), how)) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, args...), how);
  current.leave(how);
}

}  // namespace llama_fast::cuda
