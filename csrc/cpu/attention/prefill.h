// Prefill and training: blocks of queries against tiles of keys, as two small matrix products.
//
// Both products have their left side in rows of units and their right side packed in panels as wide
// as the registers of the inner loop: keys with the queries' dim running down (a transpose), values
// with the keys running down. Packing is paid once a tile for all query heads of the KV head. A
// query's result depends on its keys alone: tiles start at multiples of their size, and those that
// a query does not see leave it as it is.
#pragma once

#include "../simd/amx.h"
#include "splits.h"
#include "tiles.h"

namespace llama_fast {
namespace ISA {

constexpr int MR = vf::W == 1 ? 4 : 6;                        // queries of the inner loop,
constexpr int NV = vf::W == 16 ? 4 : vf::W == 8 ? 2 : 4;      // vectors of keys or of o's columns
constexpr int PANEL = NV * vf::W;
constexpr int STRIP = 4 * MR;  // queries whose scores stay in L1

// The products of prefill: c[r] = a[r] · b for MR rows of a and a panel of N vectors of b, over `steps`
// units, of which there are whole STEPS; with a correction, plus correction[r] · c[r]. By sums in vectors,
template <class T> struct Products {
  static constexpr int MR = ISA::MR, STRIP = ISA::STRIP, STEPS = 1;

  template <int N>
  static void multiply(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c,
                       int64_t c_stride, const float* correction) {
    ISA::multiply<T, MR, N>(a, a_stride, b, steps, [&](int r, int i, vf sums_of) {
      float* at = c + r * c_stride + i * vf::W;
      store(at, correction ? fma(load(at), set(correction[r]), sums_of) : sums_of);
    });
  }
};
#ifdef ISA_HAS_TILES
// or in tile registers: queries, or weights, are their left side, a panel is several right sides.
template <> struct Products<bf16> {
  static constexpr int MR = TILE_WORDS, STRIP = 2 * MR, STEPS = TILE_WORDS;

  template <int N>
  static void multiply(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c,
                       int64_t c_stride, const float* correction) {
    constexpr int64_t row = N * TILE_BYTES;
    written(a);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step += STEPS) {
      const char* right = reinterpret_cast<const char*>(b) + step * row;
      _tile_loadd(4, a + step, a_stride * 4);
      _tile_loadd(5, right, row);
      _tile_dpbf16ps(0, 4, 5);
      if (N > 1) _tile_loadd(6, right + TILE_BYTES, row);
      if (N > 1) _tile_dpbf16ps(1, 4, 6);
      if (N > 2) _tile_loadd(7, right + 2 * TILE_BYTES, row);
      if (N > 2) _tile_dpbf16ps(2, 4, 7);
      if (N > 3) _tile_loadd(5, right + 3 * TILE_BYTES, row);
      if (N > 3) _tile_dpbf16ps(3, 4, 5);
    }
    alignas(64) float buffer[MR * N * TILE_WORDS];
    float* sums = correction ? buffer : c;
    const int64_t stride = correction ? row : c_stride * 4;
    _tile_stored(0, sums, stride);
    if (N > 1) _tile_stored(1, sums + TILE_WORDS, stride);
    if (N > 2) _tile_stored(2, sums + 2 * TILE_WORDS, stride);
    if (N > 3) _tile_stored(3, sums + 3 * TILE_WORDS, stride);
    written(sums);
    for (int r = 0; correction && r < MR; ++r) {
      const vf factor = set(correction[r]);
      for (int i = 0; i < N; ++i) {
        float* at = c + r * c_stride + i * vf::W;
        store(at, fma(load(at), factor, load(buffer + (r * N + i) * vf::W)));
      }
    }
  }
};
#endif

// How many query heads a block holds at most: its working memory stays in L2.
static inline int64_t prefill_rows(int64_t D) {
  const int64_t rows = (vf::W == 16 ? 16 : 8) * STRIP;  // AVX-512 comes with 1 MB and more
  return D <= 128 ? rows : rows / 2;
}

constexpr int MOST_MR = std::max(Products<float>::MR, Products<bf16>::MR);
constexpr int MOST_STRIP = std::max(Products<float>::STRIP, Products<bf16>::STRIP);

struct PrefillMemory {
  float *q, *k, *v, *s, *correction;
  float *o, *m, *l;                       // of the split that is computed,
  float *whole_o, *whole_m, *whole_l;  // and of those before it
  int64_t q_stride, o_stride, floats;

  // Laid out from `memory`, which may be null to learn the size.
  PrefillMemory(float* memory, int64_t rows, int64_t D) : floats(0) {
    const int64_t padded = round_up(rows, MOST_MR);
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
    s = take(MOST_STRIP * TILE);
    correction = take(MOST_STRIP);
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
  Products<T>::template multiply<N>(weights, TILE, m.v + begin * tile_steps, steps,
                 m.o + row * m.o_stride + begin, m.o_stride, correction);
}

// The same where some of the rows see fewer values than others, or end within a unit: a value that a row
// does not see must not reach it, be it NaN. The first `common` values, which all see, are added together.
template <class T, int N>
static void add_own_panels(const PrefillMemory& m, const float* weights, int64_t row, int64_t common,
                           const int64_t (&own)[Products<T>::MR], int64_t tile_steps,
                           const float* correction, int64_t begin) {
  constexpr int MR = Products<T>::MR;
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

#ifdef ISA_HAS_TILES
// Whether all of these pairs are finite: one that is not would reach the sum of a weight of zero.
static inline bool all_finite(const float* pairs, int64_t count) {
  vf check = zero();
  for (int64_t i = 0; i < count; i += vf::W) {
    vf even, odd;
    split(bits(load(pairs + i)), even, odd);
    check = fma(even, zero(), fma(odd, zero(), check));
  }
  return sum(check) == 0.f;
}

// The same by tile registers, where some values are not finite: for each number of values that rows see,
// all of them are multiplied by a copy in which the others are zeros.
template <int N>
static void add_seen_panels(const PrefillMemory& m, const float* weights, int64_t row,
                            const int64_t (&own)[TILE_WORDS], int64_t steps, int64_t tile_steps,
                            const float* correction, int64_t begin) {
  constexpr int W = vf::W;
  if constexpr (N > 1) {
    if (m.o_stride - begin < N * W)
      return add_seen_panels<N - 1>(m, weights, row, own, steps, tile_steps, correction, begin);
  }
  alignas(64) float seen[TILE / 2 * N * W], sums_of[TILE_WORDS * N * W];
  for (int r = 0; r < TILE_WORDS; ++r) {
    if (own[r] == 0 || (r > 0 && own[r] == own[r - 1])) continue;  // rows of one token are neighbours
    for (int64_t i = 0; i < steps * N; ++i) {
      const int64_t key = i / N * 2;
      const vf pair = load(m.v + begin * tile_steps + i * W);
      store(seen + i * W, key + 1 < own[r] ? pair : key < own[r] ? Unit<bf16>::first(pair) : zero());
    }
    Products<bf16>::multiply<N>(weights, TILE, seen, steps, sums_of, N * W, nullptr);
    for (int same = r; same < TILE_WORDS && own[same] == own[r]; ++same)
      for (int i = 0; i < N; ++i) {
        float* at = m.o + (row + same) * m.o_stride + begin + i * W;
        store(at, fma(load(at), set(correction[same]), load(sums_of + (same * N + i) * W)));
      }
  }
}
#endif

// The queries [t_begin, t_end) of a row of the batch and a KV head; over one of its splits alone, the keys
// [key_begin, key_end), where there is a `partial` for what is known of them then.
template <class T>
static void prefill(const AttentionArgs& a, const Row& row, int64_t b, int64_t head, int64_t t_begin,
                    int64_t t_end, int64_t key_begin, int64_t key_end, float* memory,
                    const Partial* partial) {
  constexpr int SIZE = Unit<T>::size, MR = Products<T>::MR, STRIP = Products<T>::STRIP;
  constexpr int KEYS = Products<T>::STEPS * SIZE;  // whose values are added together
  const int64_t G = a.H / a.K, D = a.D, rows = (t_end - t_begin) * G;
  const int64_t units = round_up(D / SIZE, Products<T>::STEPS);
  const int64_t padded = round_up(rows, MR);
  PrefillMemory m(memory, rows, D);

  for (int64_t r = 0; r < padded; ++r) {
    float* to = m.q + r * m.q_stride;
    std::fill(to, to + m.q_stride, 0.f);
    if (r < rows)
      put_units(a.q.at<const T>(b, t_begin + r / G) + (head * G + r % G) * a.q.stride.h, D, to);
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
  const int64_t end = std::min(visible(rows - 1), key_end);
  for (int64_t tile = key_begin; tile < end; tile += TILE) {
    if (tile > key_begin && tile % SPLIT_KEYS == 0) {
      if (tile == SPLIT_KEYS) m.keep_split();
      else merge();
      begin_split();
    }
    const int64_t count = std::min<int64_t>(TILE, end - tile);
    const int64_t tile_steps = round_up(count, KEYS) / SIZE;
    pack_keys<T, PANEL>(keys + tile * a.k.stride.t, a.k.stride.t, count, D, m.k, units);
    pack_values<T, PANEL>(values + tile * a.v.stride.t, a.v.stride.t, count, D, m.v, tile_steps);
    bool finite = false;  // or not asked
#ifdef ISA_HAS_TILES
    if (BY_TILES<T>) finite = all_finite(m.v, tile_steps * m.o_stride);
#endif
    for (int64_t strip = 0; strip < padded; strip += STRIP) {
      const int64_t strip_end = std::min<int64_t>(strip + STRIP, padded);
      if (visible(strip_end - 1) <= tile) continue;
      auto seen = [&](int64_t r) { return std::min(count, visible(r + MR - 1) - tile); };
      for (int64_t j = 0; j < count; j += PANEL) {
        for (int64_t r = strip; r < strip_end; r += MR) {
          if (seen(r) > j)
            Products<T>::template multiply<NV>(m.q + r * m.q_stride, m.q_stride, m.k + j * units, units,
                            m.s + (r - strip) * TILE + j, TILE, nullptr);
        }
      }
      auto own = [&](int64_t r) {
        return r < rows ? std::clamp<int64_t>(visible(r) - tile, 0, count) : 0;
      };
      for (int64_t r = strip; r < strip_end; ++r) {
        const int64_t needed = round_up(std::max<int64_t>(0, seen(r / MR * MR)), KEYS);
        m.correction[r - strip] = softmax_part<T>(m.s + (r - strip) * TILE, own(r), needed, a.scale,
                                                  m.m[r], m.l[r]);
      }
      for (int64_t d = 0; d < m.o_stride; d += PANEL) {
        for (int64_t r = strip; r < strip_end; r += MR) {
          const float* weights = m.s + (r - strip) * TILE;
          const float* correction = m.correction + (r - strip);
          const int64_t common = own(r), most = seen(r), steps = round_up(most, KEYS) / SIZE;
          if (most <= 0) continue;
          if (finite || (common == most && (most == count || most % KEYS == 0))) {
            add_panels<T, NV>(m, weights, r, steps, tile_steps, correction, d);
            continue;
          }
          int64_t each[MR];
          for (int i = 0; i < MR; ++i) each[i] = own(r + i);
#ifdef ISA_HAS_TILES
          if constexpr (BY_TILES<T>) {
            add_seen_panels<NV>(m, weights, r, each, steps, tile_steps, correction, d);
            continue;
          }
#endif
          add_own_panels<T, NV>(m, weights, r, common, each, tile_steps, correction, d);
        }
      }
    }
  }

  if (partial) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(m.o + r * m.o_stride, m.o_stride, partial->sums_of + r * partial->stride);
      partial->m[r] = m.m[r];
      partial->l[r] = m.l[r];
    }
    return;
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
