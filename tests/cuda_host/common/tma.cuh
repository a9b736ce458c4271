// The twin of csrc/cuda/common/tma.cuh on the host: boxes as the CUDA driver API and the PTX ISA word
// them, and what cuTensorMapEncodeTiled refuses.
#pragma once

#include <array>
#include <common/launch.cuh>
#include <common/mbarrier.cuh>
#include <common/shared_address.cuh>
#include <vector>

#include "../swizzle.h"

namespace llama_fast::cuda {

struct TensorMap {
  const unsigned char* data;
  std::array<uint64_t, 4> sizes;
  std::array<uint64_t, 3> strides;  // in bytes, of all dims but the first
  int rows;                         // of a box
};

constexpr int BOX_ROW_BYTES = 128;

template <class T>
TensorMap tensor_map(const Launch& how, const void* data, const std::array<uint64_t, 4>& sizes,
                     const std::array<uint64_t, 3>& strides, int rows) {
  static_assert(sizeof(T) == 2, "half types");
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows > 0 && rows <= 256;
  for (const uint64_t size : sizes) fits = fits && size > 0 && size <= uint64_t(1) << 32;
  for (const uint64_t stride : strides)
    fits = fits && stride > 0 && stride % 16 == 0 && stride < uint64_t(1) << 40;
  if (!fits)
    throw LaunchError(std::string("kernel ") + how.kernel +
                      ": cuTensorMapEncodeTiled would refuse these sizes or strides");
  return {static_cast<const unsigned char*>(data), sizes, strides, rows};
}

inline void tma_load(void* box, const TensorMap& map, Mbarrier& barrier, int column, int row,
                     int third, int fourth) {
  const uint32_t start = shared_address(box);
  if (start % 1024) throw LaunchError("a box is not aligned to 1024 bytes");
  std::vector<cuda_host::async::Chunk> chunks;
  const auto inside = [&](int dim, int64_t at) { return at >= 0 && at < int64_t(map.sizes[dim]); };
  for (int r = 0; r < map.rows; ++r)
    for (int c = 0; c < BOX_ROW_BYTES / 16; ++c) {
      const bool valid = inside(0, column + c * 8) && inside(1, row + r) && inside(2, third) &&
                         inside(3, fourth);
      const uint32_t to = cuda_host::swizzled(start + r * BOX_ROW_BYTES + c * 16, 3);
      const unsigned char* from = nullptr;
      if (valid)
        from = map.data + (column + c * 8) * 2 + (row + r) * map.strides[0] +
               third * map.strides[1] + fourth * map.strides[2];
      chunks.push_back({static_cast<unsigned char*>(box) + (int64_t(to) - start), from});
    }
  cuda_host::async::copy_later(std::move(chunks), &barrier);
}

}  // namespace llama_fast::cuda
