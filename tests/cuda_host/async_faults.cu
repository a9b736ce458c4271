// What faults.cu is, for what works beside the threads of a block: barriers in shared memory, bulk
// copies, and products of warpgroups.
#include <common/launch.cuh>
#include <common/mbarrier.cuh>
#include <common/tma.cuh>
#include <common/warpgroup.cuh>
#include <common/wgmma.cuh>

#include <map>
#include <string>

#include "faults.h"

using namespace llama_fast::cuda;

constexpr int ROWS = 64, BOX = ROWS * 64;  // elements of a box of half types

struct alignas(1024) Shared {
  __half box[2][BOX];
  Mbarrier full, empty;
};

enum Fault {
  NONE,
  NO_WAIT,          // reads the box before it is there
  WRONG_PARITY,     // waits for the phase before
  NOT_STARTED,      // an mbarrier nobody has started
  NOT_SEEN,         // one whose start the others do not wait for
  NOBODY_ARRIVES,   // waits for a phase that never ends
  FEW_BYTES,        // expects less than comes
  ENDS_EARLY,       // ends while a copy is under way
  ONE_WARP_SAYS,    // overwrites the box when one of the warps that read it is done
};

// The first warp brings a box twice into the same place; the other three read it both times.
template <Fault FAULT> void boxes(TensorMap map, float* out) {
  auto& shared = shared_memory<Shared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int READERS = FAULT == ONE_WARP_SAYS ? 1 : 3;
  if (threadIdx.x == 0 && FAULT != NOT_STARTED) {
    start_mbarrier(shared.full, 1);
    start_mbarrier(shared.empty, READERS);
    publish_mbarriers();
  }
  if (FAULT != NOT_SEEN) __syncthreads();
  if (warp == 0) {
    for (int i = 0; i < 2; ++i) {
      if (i > 0) wait_for_phase(shared.empty, 0);
      if (lane == 0 && FAULT != NOBODY_ARRIVES) {
        arrive_expecting(shared.full, FAULT == FEW_BYTES ? BOX : 2 * BOX);
        tma_load(shared.box[0], map, shared.full, 0, i * ROWS, 0, 0);
      }
    }
    return;
  }
  for (int i = 0; i < (FAULT == ENDS_EARLY ? 1 : 2); ++i) {
    if (FAULT != NO_WAIT) wait_for_phase(shared.full, FAULT == WRONG_PARITY ? 1 - i : i);
    for (int j = lane; j < BOX; j += 32)
      out[i * BOX + j] = __half2float(shared.box[0][j]);
    __syncwarp();
    if (lane == 0 && (FAULT != ONE_WARP_SAYS || warp == 2)) arrive(shared.empty);
  }
}

enum Slip {
  SOUND,
  NOT_SHOWN,       // the matrices are stored, and not shown to the async proxy
  NO_FENCE,        // no wgmma.fence
  USED_EARLY,      // the result is used before the wait
  OVERWRITTEN,     // a matrix is overwritten before the wait
  A_CHANGED,       // so are the registers of A
  LEFT_OPEN,       // never waited for
  ALONE,           // one of the four warps does not take part
};

// Two warpgroups: the first multiplies ones (64, 16) by the matrix (16, 64) that both have stored.
template <Slip SLIP> void products(TensorMap, float* out) {
  auto& shared = shared_memory<Shared>();
  for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x) {
    const int row = i / 64, chunk = i % 64 / 8;
    shared.box[0][row * 64 + (chunk ^ row % 8) * 8 + i % 8] = __float2half_rn(row);
  }
  if (SLIP != NOT_SHOWN) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x >= WARPGROUP || (SLIP == ALONE && threadIdx.x >= 96)) return;
  uint32_t ones[4];
  for (uint32_t& pair : ones) pair = pack<__half>(1.0f, 1.0f);
  float d[8][4] = {};
  if (SLIP != NO_FENCE) warpgroup_arrive();
  multiply_registers<__half>(d, ones, matrix_descriptor(shared.box[0], BOX * 2));
  warpgroup_commit();
  if (SLIP == OVERWRITTEN) shared.box[0][threadIdx.x] = __float2half_rn(9.0f);
  if (SLIP == A_CHANGED) ones[1] = 0;
  const float early = d[0][0];
  if (SLIP != LEFT_OPEN) warpgroup_wait<0>(d);
  out[threadIdx.x] = SLIP == USED_EARLY ? early : d[7][3];
}

void arrivals_left(TensorMap, float*) {
  if (threadIdx.x < 32) named_barrier_arrive(1, 64);
}
void meet_in_two_groups(TensorMap, float* out) {
  auto& values = shared_memory<float[256]>();
  values[threadIdx.x] = threadIdx.x;
  named_barrier_sync(1 + threadIdx.x / 128, 128);
  out[threadIdx.x] = values[threadIdx.x ^ 64];
}
void meet_in_the_other_group(TensorMap, float* out) {
  auto& values = shared_memory<float[256]>();
  values[threadIdx.x] = threadIdx.x;
  named_barrier_sync(1 + threadIdx.x / 128, 128);
  out[threadIdx.x] = values[threadIdx.x ^ 128];
}

static const std::map<std::string, void (*)(TensorMap, float*)> kernels = {
    {"boxes", boxes<NONE>},
    {"box, no wait", boxes<NO_WAIT>},
    {"box, wrong parity", boxes<WRONG_PARITY>},
    {"box, mbarrier not started", boxes<NOT_STARTED>},
    {"box, start not seen", boxes<NOT_SEEN>},
    {"box, nobody arrives", boxes<NOBODY_ARRIVES>},
    {"box, few bytes", boxes<FEW_BYTES>},
    {"box, ends early", boxes<ENDS_EARLY>},
    {"box, one warp says", boxes<ONE_WARP_SAYS>},
    {"products", products<SOUND>},
    {"product, not shown", products<NOT_SHOWN>},
    {"product, no fence", products<NO_FENCE>},
    {"product, used early", products<USED_EARLY>},
    {"product, overwritten", products<OVERWRITTEN>},
    {"product, A changed", products<A_CHANGED>},
    {"product, left open", products<LEFT_OPEN>},
    {"product, alone", products<ALONE>},
    {"arrivals left", arrivals_left},
    {"meet", meet_in_two_groups},
    {"meet, other group", meet_in_the_other_group},
};

// Takes the bytes of a block's shared memory, makes one product of it and of 16 columns of ones and
// zeros: D (64, N).
template <class T> static void multiply_image(const uint8_t* image, int bytes, const T* a_rows,
                                              uint64_t a, uint64_t b, int N, float* out) {
  auto& shared = shared_memory<uint8_t[1]>();
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) shared[i] = image[i];
  fence_proxy_async();
  __syncthreads();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto write = [&](const float* d, int columns) {
    for (int i = 0; i < columns / 2; ++i)
      out[(row + i / 2 % 2 * 8) * columns + i / 4 * 8 + 2 * t + i % 2] = d[i];
  };
  uint32_t of_a[4];
  for (int j = 0; j < 4; ++j)
    memcpy(&of_a[j], a_rows + (row + j % 2 * 8) * 16 + j / 2 * 8 + 2 * t, 4);
  warpgroup_arrive();
  if (a) {
    float d[16][4];
    multiply_shared<T>(d, a, b, false);
    warpgroup_commit();
    warpgroup_wait<0>(d);
    write(&d[0][0], 128);
  } else if (N == 128) {
    float d[16][4] = {};
    multiply_registers<T>(d, of_a, b);
    warpgroup_commit();
    warpgroup_wait<0>(d);
    write(&d[0][0], 128);
  } else {
    float d[8][4] = {};
    multiply_registers<T>(d, of_a, b);
    warpgroup_commit();
    warpgroup_wait<0>(d);
    write(&d[0][0], 64);
  }
}

// Copies one box of `rows` rows to the start of shared memory, and its bytes to `out`.
static void one_box(TensorMap map, int rows, std::array<int, 4> at, uint8_t* out) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    start_mbarrier(shared.full, 1);
    publish_mbarriers();
    arrive_expecting(shared.full, rows * 128);
    tma_load(shared.box[0], map, shared.full, at[0], at[1], at[2], at[3]);
  }
  __syncthreads();
  wait_for_phase(shared.full, 0);
  for (int i = threadIdx.x; i < rows * 128; i += blockDim.x)
    out[i] = reinterpret_cast<const uint8_t*>(shared.box[0])[i];
}

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Runs a kernel of 256 threads over a tensor of 128 rows of 64; returns what was found, or nothing.
EXPORTED const char* run_async(const char* name, int order, const void* tensor, float* out) {
  cuda_host::order = order;
  const Launch how{name, {1}, {name[0] == 'b' ? 128u : 256u}, sizeof(Shared)};
  return caught([&] {
    launch({}, how, kernels.at(name),
           tensor_map<__half>(how, tensor, {64, 128, 1, 1}, {128, 128 * 128, 128 * 128}, ROWS),
           out);
  });
}

EXPORTED const char* wgmma(const uint8_t* image, int bytes, const void* a_rows, uint64_t a,
                           uint64_t b, int N, bool bf16, float* out) {
  const Launch how{"multiply_image", {1}, {128}, size_t(bytes)};
  return caught([&] {
    if (bf16) {
      launch({}, how, multiply_image<__nv_bfloat16>, image, bytes,
             static_cast<const __nv_bfloat16*>(a_rows), a, b, N, out);
    } else {
      launch({}, how, multiply_image<__half>, image, bytes, static_cast<const __half*>(a_rows), a,
             b, N, out);
    }
  });
}

EXPORTED const char* box_of(const void* data, const uint64_t* sizes, const uint64_t* strides,
                            int rows, const int* at, uint8_t* out) {
  const Launch how{"one_box", {1}, {32}, sizeof(Shared)};
  return caught([&] {
    const auto map = tensor_map<__half>(how, data, {sizes[0], sizes[1], sizes[2], sizes[3]},
                                        {strides[0], strides[1], strides[2]}, rows);
    launch({}, how, one_box, map, rows, std::array<int, 4>{at[0], at[1], at[2], at[3]}, out);
  });
}
