// The twin of csrc/cuda/common/wgmma.cuh on the host: descriptors are taken apart as the PTX ISA words
// them ("Matrix Descriptor Format", "Canonical Layouts"), with every swizzle and both orders.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <common/ptx.cuh>
#include <common/shared_address.cuh>
#include <vector>

#include "../async.h"
#include "../swizzle.h"

namespace llama_fast::cuda {

namespace host {

// A matrix of half types in shared memory, of which MN counts the rows of A or the columns of B.
struct SharedMatrix {
  uint32_t start, leading, stride;  // bytes
  int bits;                         // of the swizzle: rows of 16 << bits bytes
  bool k_major;

  SharedMatrix(uint64_t descriptor, bool k_major)
      : start(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        k_major(k_major) {
    const int mode = int(descriptor >> 62);  // 0 none, 1 of 128 bytes, 2 of 64, 3 of 32
    bits = mode == 0 ? 0 : 4 - mode;
    require((descriptor >> 49 & 7) == 0, "wgmma: a matrix with a base offset");
  }

  const unsigned char* element(uint32_t mn, uint32_t k) const {
    const uint32_t row_bytes = 16u << bits, row = row_bytes / 2;  // row: its elements
    uint32_t at = start;
    if (k_major) {
      at += mn / 8 * stride + mn % 8 * row_bytes;
      at += bits ? k * 2 : k / 8 * leading + k % 8 * 2;
    } else {
      at += mn % row * 2 + k % 8 * row_bytes;
      at += bits ? mn / row * leading + k / 8 * stride : mn / 8 * stride + k / 8 * leading;
    }
    const uint32_t offset = cuda_host::swizzled(at, bits) - cuda_host::SHARED_WINDOW;
    require(offset + 2 <= cuda_host::shared_size(), "wgmma: a matrix goes beyond the shared memory");
    return cuda_host::shared_bytes() + offset;
  }

  // Read by the matrix unit for this thread's warp.
  template <class T>
  __attribute__((no_sanitize("thread"))) float read(uint32_t mn, uint32_t k) const {
    uint16_t bits;
    std::memcpy(&bits, element(mn, k), 2);
    return widen(bits, static_cast<T*>(nullptr));
  }

  // Whole chunks: eight elements of a row.
  void note_reads(uint32_t first, uint32_t count, int thread) const {
    for (uint32_t mn = first; mn < first + count; mn += k_major ? 1 : 8)
      for (uint32_t k = 0; k < 16; k += k_major ? 8 : 1)
        cuda_host::reads_by_async_proxy(element(mn, k), 16, thread);
  }
};

struct Wgmma {
  float* d;
  const uint32_t* a;
  uint64_t a_shared, b;
  bool accumulate;
};

template <class T, int N, bool A_SHARED>
__attribute__((no_sanitize("thread"))) void start_product(void* const* all) {
  std::vector<float*> d;
  std::vector<const uint32_t*> a;
  const Wgmma first = *static_cast<const Wgmma*>(all[0]);
  for (int i = 0; i < cuda_host::WARPGROUP; ++i) {
    const auto& lane = *static_cast<const Wgmma*>(all[i]);
    d.push_back(lane.d);
    a.push_back(lane.a);
    require(lane.b == first.b && lane.a_shared == first.a_shared &&
                lane.accumulate == first.accumulate,
            "wgmma: the lanes give different descriptors");
  }
  const int group = cuda_host::self->number / cuda_host::WARPGROUP * cuda_host::WARPGROUP;
  const SharedMatrix a_matrix(first.a_shared, true), b_matrix(first.b, A_SHARED);
  const bool accumulate = first.accumulate;
  const auto multiply = [=](const std::vector<float*>& d)
                            __attribute__((no_sanitize("thread"))) {
    float A[64][16], B[16][N];
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) B[k][n] = b_matrix.read<T>(n, k);
    for (int warp = 0; warp < 4; ++warp) {
      b_matrix.note_reads(0, N, group + warp * 32);
      if (A_SHARED) a_matrix.note_reads(warp * 16, 16, group + warp * 32);
    }
    for (int lane = 0; lane < cuda_host::WARPGROUP; ++lane) {
      const int row = lane / 32 * 16 + lane % 32 / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int m = row + i / 2 % 2 * 8, k = 2 * t + i % 2 + i / 4 * 8;
        A[m][k] = A_SHARED ? a_matrix.read<T>(m, k) : element<T>(a[lane][i / 2], i % 2);
      }
    }
    for (int lane = 0; lane < cuda_host::WARPGROUP; ++lane) {
      const int row = lane / 32 * 16 + lane % 32 / 4, t = lane % 4;
      for (int i = 0; i < N / 2; ++i) {
        const int m = row + i / 2 % 2 * 8, n = i / 4 * 8 + 2 * t + i % 2;
        float sum = accumulate ? d[lane][i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += A[m][k] * B[k][n];
        d[lane][i] = sum;
      }
    }
  };
  cuda_host::async::product(std::move(d), N / 2, multiply);
}

}  // namespace host

inline uint64_t matrix_descriptor(const void* start, int leading, int stride = 1024) {
  constexpr uint64_t SWIZZLE_128_BYTES = 1;
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | SWIZZLE_128_BYTES << 62;
}

inline void warpgroup_arrive(CUDA_HOST_CALLED_FROM) {
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("wgmma.fence"), nullptr,
                                 [](void* const*) { cuda_host::async::warpgroup_arrive(); });
}
inline void warpgroup_commit(CUDA_HOST_CALLED_FROM) {
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("wgmma.commit_group"), nullptr,
                                 [](void* const*) { cuda_host::async::close_group(); });
}
template <int OPEN, int COLUMNS>
void warpgroup_wait(float (&)[COLUMNS][4], CUDA_HOST_CALLED_FROM) {
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("wgmma.wait_group"), nullptr, [](void* const*) {
    cuda_host::async::wait_for_groups(OPEN);
  });
}

template <class T>
void multiply_shared(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate,
                     CUDA_HOST_CALLED_FROM) {
  host::Wgmma own{&d[0][0], nullptr, a, b, accumulate};
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("wgmma"), &own, host::start_product<T, 128, true>);
}
template <class T, int COLUMNS>
void multiply_registers(float (&d)[COLUMNS][4], const uint32_t (&a)[4], uint64_t b,
                        CUDA_HOST_CALLED_FROM) {
  static_assert(COLUMNS == 8 || COLUMNS == 16, "N is 64 or 128");
  host::Wgmma own{&d[0][0], a, 0, b, true};
  cuda_host::warpgroup_operation(CUDA_HOST_HERE("wgmma"), &own,
                                 host::start_product<T, COLUMNS * 8, false>);
}

}  // namespace llama_fast::cuda
