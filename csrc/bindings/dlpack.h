// What is used here of DLPack's C interface, which stays the same for all versions of torch
// (dmlc/dlpack, include/dlpack/dlpack.h, version 1.3).
#pragma once

#include <cstdint>

namespace llama_fast {

enum DLDeviceType : int32_t { kDLCPU = 1 };
enum DLDataTypeCode : uint8_t { kDLFloat = 2, kDLBfloat = 4 };
struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// The functions of a library's tensors, in a capsule on their type (`__dlpack_c_exchange_api__`).
struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Borrows what a Python tensor holds → 0, or another number with a Python error set; may be null.
  int (*dltensor_from_py_object)(void* tensor, DLTensor* out);
  void* current_work_stream;
};

}  // namespace llama_fast
