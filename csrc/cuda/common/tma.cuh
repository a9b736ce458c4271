// Bulk copies of boxes of a tensor from global to shared memory; for sm_90 and later. PTX ISA,
// "cp.async.bulk.tensor"; CUDA driver API, "Tensor Map Object Management".
//
// A box is rows of 128 bytes, one after another, each row's 16-byte chunks swizzled: chunk c of the row
// at address a lies at c ^ (a / 128 % 8). What is outside the tensor comes as zeros.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <common/launch.cuh>
#include <type_traits>

#include "mbarrier.cuh"

namespace llama_fast::cuda {

using TensorMap = CUtensorMap;

constexpr int BOX_ROW_BYTES = 128;

// cuTensorMapEncodeTiled of the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder(const Launch& how) {
  static const auto found = [&] {
    void* entry = driver_function("cuTensorMapEncodeTiled", 12000, how);
    if (!entry)
      throw LaunchError(std::string("kernel ") + how.kernel +
                        ": the driver has no cuTensorMapEncodeTiled, so it is older than CUDA 12");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return found;
}

// A tensor of half types and four dims, the first of them contiguous: `sizes` of all, `strides` in
// bytes of the others. Boxes are 64 elements of the first dim and `rows` of the second.
template <class T>
TensorMap tensor_map(const Launch& how, const void* data, const std::array<uint64_t, 4>& sizes,
                     const std::array<uint64_t, 3>& strides, int rows) {
  TensorMap map;
  const uint32_t box[4] = {BOX_ROW_BYTES / sizeof(T), uint32_t(rows), 1, 1};
  const uint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = tensor_map_encoder(how)(
      &map,
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(data), sizes.data(), strides.data(), box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw LaunchError(std::string("kernel ") + how.kernel +
                      ": cuTensorMapEncodeTiled fails with CUresult " + std::to_string(result));
  return map;
}

// Starts the copy of the box that begins at these coordinates; `barrier` gets its bytes. The box in
// shared memory is aligned to 1024 bytes. `map` is a __grid_constant__ parameter of the kernel.
__device__ __forceinline__ void tma_load(void* box, const TensorMap& map, Mbarrier& barrier,
                                         int column, int row, int third, int fourth) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(box)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(third), "r"(fourth)
      : "memory");
}

}  // namespace llama_fast::cuda
