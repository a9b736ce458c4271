// Prefill and training: blocks of queries against tiles of keys, as two small matrix products.
//
// Both products have their left side in rows of units and their right side packed in panels as wide
// as the registers of the inner loop: keys with the queries' dim running down (a transpose), values
// with the keys running down. Packing is paid once a tile for all query heads of the KV head. A
// query's result depends on its keys alone: tiles start at multiples of their size, and those that
// a query does not see leave it as it is.
#pragma once

#include "splits.h"
#include "tiles.h"

namespace llama_fast {
namespace ISA {

constexpr int MR = vf::W == 1 ? 4 : 6;                        // queries of the inner loop,
constexpr int NV = vf::W == 16 ? 4 : vf::W == 8 ? 2 : 4;      // vectors of keys or of o's columns
constexpr int PANEL = NV * vf::W;
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
  float *q, *k, *v, *s, *correction;
  float *o, *m, *l;                       // of the split that is computed,
  float *whole_o, *whole_m, *whole_l;  // and of those before it
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
    k = take(TILE * q_stride);
    v = take(TILE * o_stride);
    s = take(STRIP * TILE);
    correction = take(STRIP);
    o = take(padded * o_stride);
    m = take(padded);
    l = take(padded);
    whole_o = take(padded * o_stride);
    whole_m = take(padded);
    whole_l = take(padded);
  }
  // What was computed becomes that of the splits before, and the other way round.
  void keep_split() {
    std::swap(o, whole_o);
    std::swap(m, whole_m);
    std::swap(l, whole_l);
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
  multiply_panel<T, N>(weights, TILE, m.v + begin * tile_steps, steps,
                 m.o + row * m.o_stride + begin, m.o_stride, correction);
}

// The same where some of the rows see fewer values than others, or end within a unit: a value that a row
// does not see must not reach it, be it NaN. The first `common` values, which all see, are added together.
template <class T, int N>
static void add_own_panels(const PrefillMemory& m, const float* weights, int64_t row, int64_t common,
                           const int64_t (&own)[MR], int64_t tile_steps, const float* correction,
                           int64_t begin) {
  constexpr int W = vf::W, SIZE = Unit<T>::size;
  if constexpr (N > 1) {
    if (m.o_stride - begin < N * W)
      return add_own_panels<T, N - 1>(m, weights, row, common, own, tile_steps, correction, begin);
  }
  const float* values = m.v + begin * tile_steps;
  float sums_of[MR][N * W];
  multiply<T, MR, N>(weights, TILE, values, common / SIZE,
                     [&](int r, int i, vf total) { store(sums_of[r] + i * W, total); });
  for (int r = 0; r < MR; ++r) {
    if (own[r] == 0) continue;
    for (int i = 0; i < N; ++i) {
      vf total = load(sums_of[r] + i * W);
      for (int64_t step = common / SIZE; step * SIZE < own[r]; ++step) {
        vf x = load(values + (step * N + i) * W);
        if constexpr (SIZE == 2)
          if (step * 2 + 1 == own[r]) x = Unit<T>::first(x);
        total = Unit<T>::madd(set(weights[r * TILE + step]), x, total);
      }
      float* at = m.o + (row + r) * m.o_stride + begin + i * W;
      store(at, fma(load(at), set(correction[r]), total));
    }
  }
}

// The queries [t_begin, t_end) of a row of the batch and a KV head.
template <class T>
static void prefill(const AttentionArgs& a, const Row& row, int64_t b, int64_t head,
                         int64_t t_begin, int64_t t_end, float* memory) {
  constexpr int SIZE = Unit<T>::size;
  const int64_t G = a.H / a.K, D = a.D, rows = (t_end - t_begin) * G, units = D / SIZE;
  const int64_t padded = round_up(rows, MR);
  PrefillMemory m(memory, rows, D);

  for (int64_t r = 0; r < padded; ++r) {
    float* to = m.q + r * m.q_stride;
    if (r < rows)
      put_units(a.q.at<const T>(b, t_begin + r / G) + (head * G + r % G) * a.q.stride.h, D, to);
    else
      std::fill(to, to + m.q_stride, 0.f);
  }
  auto begin_split = [&] {
    std::fill(m.o, m.o + padded * m.o_stride, 0.f);
    std::fill(m.m, m.m + padded, -std::numeric_limits<float>::infinity());
    std::fill(m.l, m.l + padded, 0.f);
  };
  begin_split();

  auto merge = [&] {
    for (int64_t r = 0; r < rows; ++r)
      merge_state(m.whole_o + r * m.o_stride, m.whole_m[r], m.whole_l[r], m.o + r * m.o_stride, m.m[r],
                  m.l[r], D, a.scale);
  };

  // Queries of a later strip see no fewer keys.
  auto visible = [&](int64_t r) { return row.visible(a, t_begin + std::min(r, rows - 1) / G); };
  const T* keys = static_cast<const T*>(a.k.data) + b * a.k.stride.b + head * a.k.stride.h;
  const T* values = static_cast<const T*>(a.v.data) + b * a.v.stride.b + head * a.v.stride.h;
  const int64_t end = visible(rows - 1);
  for (int64_t tile = 0; tile < end; tile += TILE) {
    if (tile && tile % SPLIT_KEYS == 0) {
      if (tile == SPLIT_KEYS) m.keep_split();
      else merge();
      begin_split();
    }
    const int64_t count = std::min<int64_t>(TILE, end - tile);
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
                            m.s + (r - strip) * TILE + j, TILE, nullptr);
        }
      }
      auto own = [&](int64_t r) {
        return r < rows ? std::clamp<int64_t>(visible(r) - tile, 0, count) : 0;
      };
      for (int64_t r = strip; r < strip_end; ++r) {
        const int64_t needed = round_up(std::max<int64_t>(0, seen(r / MR * MR)), SIZE);
        m.correction[r - strip] = softmax_part<T>(m.s + (r - strip) * TILE, own(r), needed, a.scale,
                                                  m.m[r], m.l[r]);
      }
      for (int64_t d = 0; d < m.o_stride; d += PANEL) {
        for (int64_t r = strip; r < strip_end; r += MR) {
          const float* weights = m.s + (r - strip) * TILE;
          const float* correction = m.correction + (r - strip);
          const int64_t common = own(r), most = seen(r);
          if (most <= 0) continue;
          if (common == most && (most == count || most % SIZE == 0)) {
            add_panels<T, NV>(m, weights, r, (most + SIZE - 1) / SIZE, tile_steps, correction, d);
          } else {
            int64_t each[MR];
            for (int i = 0; i < MR; ++i) each[i] = own(r + i);
            add_own_panels<T, NV>(m, weights, r, common, each, tile_steps, correction, d);
          }
        }
      }
    }
  }

  if (end > SPLIT_KEYS) {
    merge();
    m.keep_split();
  }
  for (int64_t r = 0; r < rows; ++r) {
    write_result<T>(a, b, t_begin + r / G, head * G + r % G, m.o + r * m.o_stride, m.m[r],
                    m.l[r]);
  }
}

}  // namespace ISA
}  // namespace llama_fast
