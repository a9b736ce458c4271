// The part of CUDA's runtime that csrc/cuda/common/launch.cuh and csrc/cuda/device.cu call, with faults on
// demand: see launches.cpp. An error stays the last one until somebody takes it, as CUDA has it.
#pragma once

#include <cstddef>
#include <string>

#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorFault = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = struct CUstream_st*;

struct cudaFuncAttributes { int ptxVersion; };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// What the runtime is and has been asked.
struct Runtime {
  std::string failing;  // the call that fails
  int calls_before = 0;  // so often it has not failed yet
  int ptx_version = 90;
  cudaError_t last = cudaSuccess;
  int device = 0;
  unsigned contexts = 1;  // a bit for each device that has one
  size_t shared_bytes = 0;
  int launches = 0, overlapping = 0;

  cudaError_t done(const char* call) {
    if (failing != call || calls_before-- > 0) return cudaSuccess;
    return last = cudaErrorFault;
  }
};
extern Runtime runtime;

inline cudaError_t cudaGetLastError() {
  const cudaError_t last = runtime.last;
  runtime.last = cudaSuccess;
  return last;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorFault"; }
inline const char* cudaGetErrorString(cudaError_t) { return "a fault was asked for"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = runtime.device;
  return runtime.done("cudaGetDevice");
}
inline cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = runtime.done("cudaSetDevice");
  if (error == cudaSuccess) {
    runtime.device = device;
    runtime.contexts |= 1u << device;
  }
  return error;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointNotFound };
enum { cudaEnableDefault };
#define CUDART_VERSION 13000
inline int has_context(int device, unsigned*, int* active) {
  *active = runtime.contexts >> device & 1;
  return 0;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(name) == "cuDevicePrimaryCtxGetState";
  *entry = known ? reinterpret_cast<void*>(has_context) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointNotFound;
  return runtime.done("cudaGetDriverEntryPointByVersion");
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13020;
  return runtime.done("cudaRuntimeGetVersion");
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return runtime.done("cudaDriverGetVersion");
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 7;
  return runtime.done("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  runtime.shared_bytes = bytes;
  return runtime.done("cudaFuncSetAttribute");
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = runtime.ptx_version;
  return runtime.done("cudaFuncGetAttributes");
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*)(Params...), Args...) {
  const cudaError_t error = runtime.done("cudaLaunchKernelEx");
  runtime.launches += error == cudaSuccess;
  runtime.overlapping += config->numAttrs == 1;
  return error;
}
