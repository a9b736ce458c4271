// Prefill and training: blocks of queries against tiles of keys, as two small matrix products.
//
// Both products have their left side in rows of units and their right side packed in panels as wide
// as the registers of the inner loop: keys with the queries' dim running down (a transpose), values
// with the keys running down. Packing is paid once a tile for all query heads of the KV head. A
// query's result depends on its keys alone: tiles start at multiples of their size, and those that
// a query does not see leave it as it is.
#pragma once

#include "tiles.h"

namespace llama_fast {
namespace ISA {

constexpr int MR = vf::W == 1 ? 4 : 6;                        // queries of the inner loop,
constexpr int NV = vf::W == 16 ? 4 : vf::W == 8 ? 2 : 4;      // vectors of keys or of o's columns
constexpr int PANEL = NV * vf::W;
constexpr int PREFILL_TILE = vf::W == 16 ? 128 : 64;             // keys
constexpr int STRIP = 4 * MR;  // queries whose scores stay in L1

// c[r] = a[r] · b for MR rows of a and a panel of N vectors of b, over `steps` units; with a
// correction, plus correction[r] · c[r].
template <class T, int N>
static void multiply_panel(const float* a, int64_t a_stride, const float* b, int64_t steps,
                           float* c, int64_t c_stride, const float* correction) {
  multiply<T, MR, N>(a, a_stride, b, steps, [&](int r, int i, vf sums_of) {
    float* at = c + r * c_stride + i * vf::W;
    store(at, correction ? fma(load(at), set(correction[r]), sums_of) : sums_of);
  });
}

// How many query heads a block holds at most: its working memory stays in L2.
static inline int64_t prefill_rows(int64_t D) {
  const int64_t rows = (vf::W == 16 ? 16 : 8) * STRIP;  // AVX-512 comes with 1 MB and more
  return D <= 128 ? rows : rows / 2;
}

struct PrefillMemory {
  float *q, *o, *k, *v, *s, *m, *l, *correction;
  int64_t q_stride, o_stride, floats;

  // Laid out from `memory`, which may be null to learn the size.
  PrefillMemory(float* memory, int64_t rows, int64_t D) : floats(0) {
    const int64_t padded = round_up(rows, MR);
    auto take = [&](int64_t count) {
      float* at = memory ? memory + floats : nullptr;
      floats += round_up(count, 16);
      return at;
    };
    q_stride = round_up(D, vf::W);
    o_stride = round_up(D, vf::W);
    q = take(padded * q_stride);
    o = take(padded * o_stride);
    k = take(PREFILL_TILE * q_stride);
    v = take(PREFILL_TILE * o_stride);
    s = take(STRIP * PREFILL_TILE);
    m = take(padded);
    l = take(padded);
    correction = take(STRIP);
  }
};

// o's columns += weights · values, panel by panel.
template <class T, int N>
static void add_panels(const PrefillMemory& m, const float* weights, int64_t row, int64_t steps,
                       int64_t tile_steps, const float* correction, int64_t begin) {
  const int64_t left = m.o_stride - begin;
  if constexpr (N > 1) {
    if (left < N * vf::W)
      return add_panels<T, N - 1>(m, weights, row, steps, tile_steps, correction, begin);
  }
  multiply_panel<T, N>(weights, PREFILL_TILE, m.v + begin * tile_steps, steps,
                 m.o + row * m.o_stride + begin, m.o_stride, correction);
}

// The queries [t_begin, t_end) of a row of the batch and a KV head.
template <class T>
static void prefill(const AttentionArgs& a, const Row& row, int64_t b, int64_t head,
                         int64_t t_begin, int64_t t_end, float* memory) {
  constexpr int W = vf::W, SIZE = Unit<T>::size;
  const int64_t G = a.H / a.K, D = a.D, rows = (t_end - t_begin) * G, units = D / SIZE;
  const int64_t padded = round_up(rows, MR);
  const PrefillMemory m(memory, rows, D);

  for (int64_t r = 0; r < padded; ++r) {
    const T* from = static_cast<const T*>(a.q.data) + b * a.q.stride.b +
                    (t_begin + r / G) * a.q.stride.t + (head * G + r % G) * a.q.stride.h;
    for (int64_t u = 0; u < units; u += W) {
      const vf x = r >= rows ? zero()
                   : u + W <= units ? Unit<T>::load(from + u * SIZE)
                                    : Unit<T>::load(from + u * SIZE, int(D - u * SIZE));
      store(m.q + r * m.q_stride + u, x);
    }
    for (int64_t d = 0; d < m.o_stride; d += W) store(m.o + r * m.o_stride + d, zero());
    m.m[r] = -std::numeric_limits<float>::infinity();
    m.l[r] = 0.f;
  }

  // Queries of a later strip see no fewer keys.
  auto visible = [&](int64_t r) { return row.visible(a, t_begin + std::min(r, rows - 1) / G); };
  const T* keys = static_cast<const T*>(a.k.data) + b * a.k.stride.b + head * a.k.stride.h;
  const T* values = static_cast<const T*>(a.v.data) + b * a.v.stride.b + head * a.v.stride.h;
  const int64_t end = visible(rows - 1);
  for (int64_t tile = 0; tile < end; tile += PREFILL_TILE) {
    const int64_t count = std::min<int64_t>(PREFILL_TILE, end - tile);
    const int64_t tile_steps = (count + SIZE - 1) / SIZE;
    pack_keys<T, PANEL>(keys + tile * a.k.stride.t, a.k.stride.t, count, D, m.k);
    pack_values<T, PANEL>(values + tile * a.v.stride.t, a.v.stride.t, count, D, m.v);
    for (int64_t strip = 0; strip < padded; strip += STRIP) {
      const int64_t strip_end = std::min<int64_t>(strip + STRIP, padded);
      if (visible(strip_end - 1) <= tile) continue;
      auto seen = [&](int64_t r) { return std::min(count, visible(r + MR - 1) - tile); };
      for (int64_t j = 0; j < count; j += PANEL) {
        for (int64_t r = strip; r < strip_end; r += MR) {
          if (seen(r) > j)
            multiply_panel<T, NV>(m.q + r * m.q_stride, m.q_stride, m.k + j * units, units,
                            m.s + (r - strip) * PREFILL_TILE + j, PREFILL_TILE, nullptr);
        }
      }
      for (int64_t r = strip; r < strip_end; ++r) {
        const int64_t own = r < rows ? std::min(count, visible(r) - tile) : 0;
        const int64_t needed = round_up(std::max<int64_t>(0, seen(r / MR * MR)), SIZE);
        m.correction[r - strip] = softmax_part<T>(m.s + (r - strip) * PREFILL_TILE, own, needed,
                                                  a.scale, m.m[r], m.l[r]);
      }
      for (int64_t d = 0; d < m.o_stride; d += PANEL) {
        for (int64_t r = strip; r < strip_end; r += MR) {
          if (seen(r) > 0)
            add_panels<T, NV>(m, m.s + (r - strip) * PREFILL_TILE, r, (seen(r) + SIZE - 1) / SIZE,
                              tile_steps, m.correction + (r - strip), d);
        }
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    write_result<T>(a, b, t_begin + r / G, head * G + r % G, m.o + r * m.o_stride, m.m[r],
                    m.l[r]);
  }
}

}  // namespace ISA
}  // namespace llama_fast
