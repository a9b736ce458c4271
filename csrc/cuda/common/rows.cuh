// Where a row of a strided tensor begins, and how many rows a launch covers.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"

namespace llama_fast::cuda {

__device__ __forceinline__ int64_t offset(const Rows& rows, int64_t row) {
  if (rows.n0 == 1 && rows.n1 == 1) return row * rows.stride2;  // spares the divisions
  const int64_t i2 = row % rows.n2, i1 = row / rows.n2 % rows.n1, i0 = row / rows.n2 / rows.n1;
  return i0 * rows.stride0 + i1 * rows.stride1 + i2 * rows.stride2;
}

}  // namespace llama_fast::cuda
