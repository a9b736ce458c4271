// Kernels with one fault each, and sound ones beside them: what the host's machine says of them is
// checked by test_machine.py.
#include <common/launch.cuh>
#include <common/pdl.cuh>
#include <common/ptx.cuh>

#include <cstdlib>
#include <map>
#include <string>

#include "faults.h"

using namespace llama_fast::cuda;

// Each thread reads what its neighbour wrote.
template <bool BARRIER> void neighbours(float* out) {
  auto& values = shared_memory<float[64]>();
  values[threadIdx.x] = threadIdx.x;
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// The same within each warp, where a shuffle is no barrier and __syncwarp is one.
template <bool BARRIER> void neighbours_in_warp(float* out) {
  auto& values = shared_memory<float[64]>();
  values[threadIdx.x] = threadIdx.x;
  if (BARRIER) __syncwarp();
  else __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Reads, and then overwrites what others may still read.
void overwritten(float* out) {
  auto& values = shared_memory<float[64]>();
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
  values[threadIdx.x] = 0;
}

void two_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void half_a_warp(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void not_in_mask(float*) { __syncwarp(0xffff); }

void different_operations(float*) {
  if (threadIdx.x % 2) __syncwarp();
  else __ballot_sync(0xffffffffu, true);
}

// Copies 16 bytes a thread, and reads what the next thread copied.
template <bool WAIT, bool BARRIER> void copied(float* out) {
  auto& values = shared_memory<float[64][4]>();
  alignas(16) static float source[64][4];
  for (float& value : source[threadIdx.x]) value = threadIdx.x;
  copy_async(values[threadIdx.x], source[threadIdx.x], true);
  cp_async_commit();
  if (WAIT) cp_async_wait<0>();
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64][0];
  cp_async_wait<0>();
}

void copies_left_open(float*) {
  auto& values = shared_memory<float[64][4]>();
  alignas(16) static float source[4];
  copy_async(values[threadIdx.x], source, true);
}

void reads_undefined(float* out) { out[threadIdx.x] = shared_memory<float[64]>()[threadIdx.x]; }

void in_order(float* out) { out[0] = threadIdx.x; }

template <bool WAIT> void overlapping(float*) {
  if (WAIT || threadIdx.x != 40) griddepcontrol_wait();
}

static const std::map<std::string, void (*)(float*)> kernels = {
    {"overlapping", overlapping<true>},
    {"overlapping, one does not wait", overlapping<false>},
    {"neighbours", neighbours<true>},
    {"neighbours, no barrier", neighbours<false>},
    {"neighbours in a warp", neighbours_in_warp<true>},
    {"neighbours in a warp, no barrier", neighbours_in_warp<false>},
    {"overwritten", overwritten},
    {"two barriers", two_barriers},
    {"half a warp", half_a_warp},
    {"not in mask", not_in_mask},
    {"different operations", different_operations},
    {"copied", copied<true, true>},
    {"copied, no wait", copied<false, true>},
    {"copied, no barrier", copied<true, false>},
    {"copies left open", copies_left_open},
    {"reads undefined", reads_undefined},
    {"in order", in_order},
};

// Products of 16 x 16 and 16 x 8 matrices by ldmatrix and mma: a (16, 16) and b (8, 16), both as rows
// of k, or b (16, 8) as rows of n if `transposed`; c (16, 8).
template <class T> static void product(const T* a, const T* b, float* c, bool transposed) {
  struct Shared { T a[16][16], b[16][16]; };
  auto& shared = shared_memory<Shared>();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) shared.a[i / 16][i % 16] = a[i];
  // b has half as many elements; its rows are 16 bytes or 32.
  for (int i = lane; i < 128; i += 32)
    shared.b[transposed ? i / 8 : i / 16][transposed ? i % 8 : i % 16] = b[i];
  __syncwarp();
  uint32_t of_a[4], all_b[4];
  ldmatrix(of_a, &shared.a[lane % 16][lane / 16 * 8]);
  if (transposed) ldmatrix_transposed(all_b, &shared.b[lane % 16][0]);
  else ldmatrix(all_b, &shared.b[lane % 8][lane / 8 % 2 * 8]);
  const uint32_t of_b[2] = {all_b[0], all_b[1]};
  float of_c[4] = {};
  mma_16x8x16<T>(of_c, of_a, of_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = of_c[i];
}

extern "C" {
// Runs a kernel of 64 threads; returns what was found, or nothing.
__attribute__((visibility("default"))) const char* run(const char* name, int order, float* out) {
  cuda_host::order = order;
  return caught([&] {
    const bool overlaps = name[0] == 'o' && name[1] == 'v' && name[4] == 'l';
    launch({0, nullptr, true}, {name, {1}, {64}, 64 * 4 * sizeof(float), overlaps},
           kernels.at(name), out);
  });
}

__attribute__((visibility("default"))) const char* multiply(const void* a, const void* b, float* c,
                                                            bool transposed, bool bf16) {
  const Launch how{"product", {1}, {32}, 2 * 16 * 16 * 2};
  return caught([&] {
    if (bf16) {
      launch({}, how, product<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(a),
             static_cast<const __nv_bfloat16*>(b), c, transposed);
    } else {
      launch({}, how, product<__half>, static_cast<const __half*>(a),
             static_cast<const __half*>(b), c, transposed);
    }
  });
}

// All 65536 numbers of a half type to float, and floats to it.
__attribute__((visibility("default"))) void convert(bool bf16, float* widened,
                                                    const float* floats, uint16_t* narrowed,
                                                    int count) {
  for (int i = 0; i < 65536; ++i) {
    const uint16_t bits = i;
    widened[i] = bf16 ? __bfloat162float({bits}) : __half2float({bits});
  }
  for (int i = 0; i < count; ++i)
    narrowed[i] = bf16 ? __float2bfloat16_rn(floats[i]).bits : __float2half_rn(floats[i]).bits;
}
}
