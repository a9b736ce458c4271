// Prefill for sm_90a, by TMA and wgmma: warpgroups with roles of their own. Shah et al.,
// "FlashAttention-3" (2024).
//
// A block has 64 rows for each of two consumers, and walks over the keys in tiles of 128. A third
// warpgroup, the producer, gives most of its registers to them and starts TMA loads of keys and
// values into two stages each; barriers say which stages are full and which are empty.
//
// A consumer keeps the matrix units busy while it makes weights of its scores: the scores of a tile are
// under way together with the sum of the values of the tile before. And the two play ping-pong: one
// multiplies while the other works on its softmax.
#pragma once

#include <common/mbarrier.cuh>
#include <common/tma.cuh>
#include <common/warpgroup.cuh>
#include <common/wgmma.cuh>

#include "output.cuh"
#include "problem.cuh"
#include "softmax.cuh"

namespace llama_fast::cuda {

constexpr int CONSUMERS = 2, CONSUMER_ROWS = 64, WIDE_TILE = 128, WIDE_STAGES = 2;
constexpr int WARPGROUP_THREADS = (CONSUMERS + 1) * WARPGROUP;
// A launch gives each thread 168 registers, as many as fit. What consumers take beyond that must have
// been the producer's: with more, they would wait for ever.
constexpr int LAUNCH_REGISTERS = 168, CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <=
              (CONSUMERS + 1) * LAUNCH_REGISTERS);
constexpr int PANEL = 64;  // elements of a row of 128 bytes

enum NamedBarrier { QUERIES = 1, TURN = QUERIES + CONSUMERS };  // of each consumer its own

// Matrices are panels of 64 columns, each of rows of 128 bytes, swizzled as tma.cuh says.
template <class T, int D> struct alignas(1024) WarpgroupsShared {
  static constexpr int PANELS = D / PANEL;
  T q[CONSUMERS][PANELS][CONSUMER_ROWS * PANEL];
  T k[WIDE_STAGES][PANELS][WIDE_TILE * PANEL], v[WIDE_STAGES][PANELS][WIDE_TILE * PANEL];
  Mbarrier k_full[WIDE_STAGES], k_empty[WIDE_STAGES], v_full[WIDE_STAGES], v_empty[WIDE_STAGES];
  Mbarrier last_values;
};

// The parity of the phase in which tile i fills its stage.
__device__ __forceinline__ int parity_of(int i) { return i / WIDE_STAGES % 2; }

template <class T, int D>
__device__ __forceinline__ void start_mbarriers(WarpgroupsShared<T, D>& shared) {
  constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
  for (int stage = 0; stage < WIDE_STAGES; ++stage) {
    start_mbarrier(shared.k_full[stage], 1);
    start_mbarrier(shared.v_full[stage], 1);
    start_mbarrier(shared.k_empty[stage], CONSUMER_WARPS);
    start_mbarrier(shared.v_empty[stage], CONSUMER_WARPS);
  }
  start_mbarrier(shared.last_values, 1);
  publish_mbarriers();
}

// The producer, one warp of it: tiles in the order in which they are used.
template <class T, int D>
__device__ __forceinline__ void produce(WarpgroupsShared<T, D>& shared, const TensorMap& k_map,
                                        const TensorMap& v_map, const Problem<T>& problem, int S,
                                        int tiles, int kv, int b, int lane) {
  constexpr int PANELS = WarpgroupsShared<T, D>::PANELS;
  const auto copy = [&](T(&stage)[PANELS][WIDE_TILE * PANEL], const TensorMap& map,
                        Mbarrier& full, int first) {
    if (lane != 0) return;
    arrive_expecting(full, sizeof stage);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
      tma_load(stage[panel], map, full, panel * PANEL, first, kv, b);
  };
  // The values behind the row's length may be NaN, and NaN times a weight of 0 is NaN. Behind S
  // there are none, and the copy brings zeros.
  const auto copy_last_values = [&](T(&stage)[PANELS][WIDE_TILE * PANEL], Mbarrier& full,
                                    int first) {
    copy(stage, v_map, shared.last_values, first);
    wait_for_phase(shared.last_values, 0);
    constexpr int CHUNKS = PANEL / 8;
    for (int panel = 0; panel < PANELS; ++panel)
      for (int i = (problem.length - first) * CHUNKS + lane; i < WIDE_TILE * CHUNKS; i += WARP)
        reinterpret_cast<uint4*>(stage[panel])[i] = {0, 0, 0, 0};
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) arrive(full);
  };
  for (int i = 0; i <= tiles; ++i) {
    if (i < tiles) {
      const int stage = i % WIDE_STAGES;
      wait_for_phase(shared.k_empty[stage], parity_of(i) ^ 1);
      copy(shared.k[stage], k_map, shared.k_full[stage], i * WIDE_TILE);
    }
    if (i > 0) {
      const int stage = (i - 1) % WIDE_STAGES, first = (i - 1) * WIDE_TILE;
      wait_for_phase(shared.v_empty[stage], parity_of(i - 1) ^ 1);
      if (problem.length < min(first + WIDE_TILE, S))
        copy_last_values(shared.v[stage], shared.v_full[stage], first);
      else
        copy(shared.v[stage], v_map, shared.v_full[stage], first);
    }
  }
}

// The consumer's 64 rows of q, as the copies leave those of k and v; zeros where there is no row.
template <class T, int D>
__device__ __forceinline__ void store_queries(T (&tile)[D / PANEL][CONSUMER_ROWS * PANEL],
                                              const Problem<T>& problem, int first_row,
                                              int thread) {
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int i = thread; i < CONSUMER_ROWS * CHUNKS; i += WARPGROUP) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    uint4 bits = {0, 0, 0, 0};
    if (const T* from = problem.query(first_row + row))
      bits = *reinterpret_cast<const uint4*>(from + chunk * 8);
    reinterpret_cast<uint4*>(tile[chunk / 8])[row * 8 + (chunk % 8 ^ row % 8)] = bits;
  }
}

// scores (64, 128) = q · kᵀ; starts the products.
template <class T, int PANELS>
__device__ __forceinline__ void multiply_keys(float (&scores)[WIDE_TILE / 8][4],
                                              const T (&q)[PANELS][CONSUMER_ROWS * PANEL],
                                              const T (&k)[PANELS][WIDE_TILE * PANEL]) {
#pragma unroll
  for (int i = 0; i < PANELS * PANEL / 16; ++i) {
    const int panel = i / 4, column = i % 4 * 16;
    multiply_shared<T>(scores, matrix_descriptor(&q[panel][column], 16),
                       matrix_descriptor(&k[panel][column], 16), i > 0);
  }
  warpgroup_commit();
}

// o (64, D) += weights · v; starts the products.
template <class T, int D, int PANELS>
__device__ __forceinline__ void multiply_values(float (&o)[D / 8][4],
                                                const uint32_t (&weights)[WIDE_TILE / 16][4],
                                                const T (&v)[PANELS][WIDE_TILE * PANEL]) {
#pragma unroll
  for (int i = 0; i < WIDE_TILE / 16; ++i)
    multiply_registers<T>(o, weights[i],
                          matrix_descriptor(&v[0][i * 16 * PANEL], int(sizeof v[0])));
  warpgroup_commit();
}

// The weights as the A of the products with v: 4 registers for each 16 keys.
template <class T>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[WIDE_TILE / 16][4],
                                             const float (&weights)[WIDE_TILE / 8][4]) {
#pragma unroll
  for (int i = 0; i < WIDE_TILE / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      packed[i][j] = pack<T>(weights[2 * i + j / 2][j % 2 * 2], weights[2 * i + j / 2][j % 2 * 2 + 1]);
}

template <class T, int D>
__device__ __forceinline__ void consume(WarpgroupsShared<T, D>& shared, const AttentionArgs& a,
                                        const Problem<T>& problem, int tiles, int consumer,
                                        int block_row, int kv, int b) {
  const int thread = threadIdx.x % WARPGROUP, lane = thread % WARP, g = lane / 4, t = lane % 4;
  const int first_row = block_row + consumer * CONSUMER_ROWS;
  const int row[2] = {first_row + thread / WARP * 16 + g, first_row + thread / WARP * 16 + g + 8};
  const int limit[2] = {problem.limit(row[0]), problem.limit(row[1])};
  const int all_see = problem.limit(first_row);  // the keys below this; 0 where there is no row
  store_queries<T, D>(shared.q[consumer], problem, first_row, thread);
  fence_proxy_async();
  named_barrier_sync(QUERIES + consumer, WARPGROUP);

  const auto& q = shared.q[consumer];
  // Every warp says that it is done: what waits for its products is the warp.
  const auto release = [&](Mbarrier& empty) {
    if (lane == 0) arrive(empty);
  };
  const auto hide = [&](float(&scores)[WIDE_TILE / 8][4], int first) {
    if (first + WIDE_TILE <= all_see) return;
#pragma unroll
    for (int n = 0; n < WIDE_TILE / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + 8 * n + 2 * t + j % 2 >= limit[j / 2]) scores[n][j] = MINUS_INFINITY;
  };
  Softmax softmax;
  float o[D / 8][4] = {}, correction[2];
  uint32_t weights[WIDE_TILE / 16][4];
  if (tiles > 0) {
    float scores[WIDE_TILE / 8][4];
    wait_for_phase(shared.k_full[0], 0);
    warpgroup_arrive();
    multiply_keys(scores, q, shared.k[0]);
    warpgroup_wait<0>(scores);
    release(shared.k_empty[0]);
    hide(scores, 0);
    take_unscaled(softmax, scores, a.scale, correction);  // o is 0 yet
    pack_weights<T>(weights, scores);
  }
  if (consumer == 1 && tiles > 1) named_barrier_arrive(TURN, CONSUMERS * WARPGROUP);  // 0 begins
  for (int i = 1; i < tiles; ++i) {
    const int stage = i % WIDE_STAGES, before = (i - 1) % WIDE_STAGES;
    float scores[WIDE_TILE / 8][4];
    wait_for_phase(shared.k_full[stage], parity_of(i));
    named_barrier_sync(TURN + consumer, CONSUMERS * WARPGROUP);
    warpgroup_arrive();
    multiply_keys(scores, q, shared.k[stage]);
    wait_for_phase(shared.v_full[before], parity_of(i - 1));
    multiply_values<T, D>(o, weights, shared.v[before]);
    // Consumer 0 has no turn after its last.
    if (consumer == 0 || i + 1 < tiles) named_barrier_arrive(TURN + 1 - consumer, CONSUMERS * WARPGROUP);
    warpgroup_wait<1>(scores);
    release(shared.k_empty[stage]);
    hide(scores, i * WIDE_TILE);
    take_unscaled(softmax, scores, a.scale, correction);
    warpgroup_wait<0>(o);
    release(shared.v_empty[before]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) o[n][j] *= correction[j / 2];
    pack_weights<T>(weights, scores);
  }
  if (tiles > 0) {
    wait_for_phase(shared.v_full[(tiles - 1) % WIDE_STAGES], parity_of(tiles - 1));
    warpgroup_arrive();
    multiply_values<T, D>(o, weights, shared.v[(tiles - 1) % WIDE_STAGES]);
    warpgroup_wait<0>(o);
  }
  finish(softmax);
#pragma unroll
  for (int i = 0; i < 2; ++i) softmax.m[i] *= a.scale.unit;
  write_rows<T, D>(a, problem, kv, b, row, softmax, o, t);
}

template <class T, int D>
__global__ void __launch_bounds__(WARPGROUP_THREADS, 1)
attention_prefill_wgmma_kernel(AttentionArgs a, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& shared = shared_memory<WarpgroupsShared<T, D>>();
  const int kv = blockIdx.x, b = blockIdx.z;
  const Problem<T> problem(a, kv, b);
  // Blocks that see the most keys come first.
  const int block_row = int(gridDim.y - 1 - blockIdx.y) * CONSUMERS * CONSUMER_ROWS;
  const int end = problem.limit(min(block_row + CONSUMERS * CONSUMER_ROWS, problem.rows()) - 1);
  const int tiles = (end + WIDE_TILE - 1) / WIDE_TILE;
  if (threadIdx.x == 0) start_mbarriers(shared);
  __syncthreads();
  // From lane 0, so that the compiler knows that a warp has one role.
  const int warpgroup = __shfl_sync(WHOLE_WARP, int(threadIdx.x) / WARPGROUP, 0);
  if (warpgroup == CONSUMERS) {
    shrink_to_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x % WARPGROUP / WARP == 0)
      produce(shared, k_map, v_map, problem, int(a.S), tiles, kv, b, threadIdx.x % WARP);
  } else {
    grow_to_registers<CONSUMER_REGISTERS>();
    consume(shared, a, problem, tiles, warpgroup, block_row, kv, b);
  }
#else
  __trap();  // the launcher takes it on sm_90 alone
#endif
}

}  // namespace llama_fast::cuda
