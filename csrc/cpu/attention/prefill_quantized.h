// Prefill against keys and values in 8 bits: blocks of queries, as in prefill.h, in the words of
// decode_quantized.h, whose sums are exact whatever their order.
#pragma once

#include "decode_quantized.h"
#include "prefill.h"

namespace llama_fast {
namespace ISA {

// A unit is two words; sums are integers in the lanes of a vf.
template <> struct Unit<int8_t> {
  static constexpr int size = 2;
  template <class Width> static vf load(const int8_t* p, Width width) {
    return as_floats(load_words(p, width));
  }
  static vf madd(vf a, vf b, vf c) { return dot_words(a, b, c); }
  static void pair(const int8_t* row, const int8_t* next, int n, vf (&x)[2]) {
    vi a, b;
    load_columns(row, next ? next : row, a, b, n);  // under a weight of zero
    order_columns(as_floats(a), as_floats(b), x[0], x[1]);
  }
};

// Rows are rows of words: NUMBER of them, one behind another, are a query.
template <class T> struct QuantizedPrefillMemory {
  static constexpr int NUMBER = WORDS<T>;
  static_assert(MR % NUMBER == 0 && STRIP % 4 == 0);
  float *q, *q_steps, *wide, *k, *v, *s, *weights, *steps, *correction;
  float *o, *m, *l;                     // of the split that is computed; l in the lanes of a vector,
  float *whole_o, *whole_m, *whole_l;  // and of those before it
  int64_t padded, q_stride, o_stride, floats = 0;

  // Laid out from `memory`, which may be null to learn the size.
  QuantizedPrefillMemory(float* memory, int64_t queries, int64_t D)
      : padded(round_up(queries * NUMBER, STRIP) / NUMBER),
        q_stride(round_up(D, 2 * vf::W) / 2),
        o_stride(round_up(D, vf::W)) {
    auto take = [&](int64_t count) {
      float* at = memory ? memory + floats : nullptr;
      floats += round_up(count, 16);
      return at;
    };
    q = take(padded * NUMBER * q_stride);
    q_steps = take(padded * NUMBER);
    wide = take(2 * q_stride);
    k = take(QUANTIZED_TILE * q_stride);
    v = take(QUANTIZED_TILE / 2 * o_stride);
    s = take(STRIP * QUANTIZED_TILE);
    weights = take(STRIP * QUANTIZED_TILE / 2);
    steps = take(STRIP);
    correction = take(STRIP);
    o = take(padded * o_stride);
    m = take(padded);
    l = take(padded * vf::W);
    whole_o = take(padded * o_stride);
    whole_m = take(padded);
    whole_l = take(padded * vf::W);
  }
  void begin_split() const {
    std::fill(o, o + padded * o_stride, 0.f);
    std::fill(m, m + padded, -std::numeric_limits<float>::infinity());
    std::fill(l, l + padded * vf::W, 0.f);
  }
  // The sum of a query's weights takes the place of its first lane.
  void end_split() const {
    for (int64_t r = 0; r < padded; ++r) l[r * vf::W] = sum(load(l + r * vf::W));
  }
  // What was computed becomes that of the splits before, and the other way round.
  void keep_split() {
    std::swap(o, whole_o);
    std::swap(m, whole_m);
    std::swap(l, whole_l);
  }
};

// o's columns [d, d + N · W) of MR rows of words = correction · o + steps · weights · values.
template <class T, int N = NV>
static void add_word_panels(const QuantizedPrefillMemory<T>& m, int64_t row, int64_t strip, int64_t steps,
                            int64_t tile_steps, int64_t d) {
  if constexpr (N > 1)
    if (m.o_stride - d < N * vf::W)
      return add_word_panels<T, N - 1>(m, row, strip, steps, tile_steps, d);
  constexpr int NUMBER = WORDS<T>;
  const int64_t of_strip = row - strip;
  multiply<int8_t, MR, N>(
      m.weights + of_strip * QUANTIZED_TILE / 2, QUANTIZED_TILE / 2, m.v + d * tile_steps, steps,
      [&](int r, int i, vf sums_of) {
        const vf factor = set(r % NUMBER ? 1.f : m.correction[(of_strip + r) / NUMBER]);
        float* at = m.o + (row + r) / NUMBER * m.o_stride + d + i * vf::W;
        store(at, fma(to_float(as_lanes(sums_of)), set(m.steps[of_strip + r]), load(at) * factor));
      });
}

// The queries [t_begin, t_end) of a row of the batch and a KV head.
template <class T>
static void prefill_quantized(const AttentionArgs& a, const Row& row, int64_t b, int64_t head,
                              int64_t t_begin, int64_t t_end, float* memory) {
  constexpr int W = vf::W, NUMBER = WORDS<T>, AT_ONCE = 4 / NUMBER;
  const int64_t G = a.H / a.K, D = a.D, queries = (t_end - t_begin) * G, rows = queries * NUMBER;
  QuantizedPrefillMemory<T> m(memory, queries, D);

  std::fill(m.wide, m.wide + 2 * m.q_stride, 0.f);
  std::fill(m.q, m.q + m.padded * NUMBER * m.q_stride, 0.f);
  std::fill(m.q_steps, m.q_steps + m.padded * NUMBER, 0.f);
  for (int64_t r = 0; r < queries; ++r) {
    const T* from = a.q.at<const T>(b, t_begin + r / G) + (head * G + r % G) * a.q.stride.h;
    for_each_vector(D, [&](int64_t d, auto width) { store(m.wide + d, load(from + d, width)); });
    to_words<NUMBER>(m.wide, 2 * m.q_stride,
                     reinterpret_cast<int16_t*>(m.q + r * NUMBER * m.q_stride), 2 * m.q_stride,
                     m.q_steps + r * NUMBER);
  }
  m.begin_split();
  auto merge = [&] {
    for (int64_t r = 0; r < queries; ++r)
      merge_state(m.whole_o + r * m.o_stride, m.whole_m[r], m.whole_l[r * W], m.o + r * m.o_stride,
                  m.m[r], m.l[r * W], D, a.scale);
  };

  // Queries of a later strip see no fewer keys.
  auto visible = [&](int64_t r) {
    return row.visible(a, t_begin + std::min(r / NUMBER, queries - 1) / G);
  };
  const int64_t end = visible(rows - 1), units = D / 2;
  for (int64_t tile = 0; tile < end; tile += QUANTIZED_TILE) {
    if (tile && tile % SPLIT_KEYS == 0) {
      m.end_split();
      if (tile == SPLIT_KEYS) m.keep_split();
      else merge();
      m.begin_split();
    }
    const int64_t count = std::min<int64_t>(QUANTIZED_TILE, end - tile);
    const int64_t tile_steps = (count + 1) / 2;
    const auto rows_of = [&](const Heads& x) { return x.at<const int8_t>(b, tile) + head * x.stride.h; };
    pack_keys<int8_t, PANEL>(rows_of(a.k), a.k.stride.t, count, D, m.k);
    pack_values<int8_t, PANEL>(rows_of(a.v), a.v.stride.t, count, D, m.v);
    const TileScales k_scales(a.k_scales, b, head, tile, count), v_scales(a.v_scales, b, head, tile, count);

    for (int64_t strip = 0; strip < rows; strip += STRIP) {
      if (visible(strip + STRIP - 1) <= tile) continue;
      auto seen = [&](int64_t r) { return std::min(count, visible(r + MR - 1) - tile); };
      for (int64_t j = 0; j < count; j += PANEL) {
        for (int64_t r = strip; r < strip + STRIP; r += MR) {
          if (seen(r) <= j) continue;
          multiply<int8_t, MR, NV>(m.q + r * m.q_stride, m.q_stride, m.k + j * units, units,
                                   [&](int i, int n, vf sums_of) {
                                     store(m.s + (r - strip + i) * QUANTIZED_TILE + j + n * W,
                                           to_float(as_lanes(sums_of)));
                                   });
        }
      }
      for (int64_t r = strip; r < strip + STRIP; r += AT_ONCE * NUMBER) {
        int64_t own[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) {
          const int64_t query = r / NUMBER + i;
          own[i] = query < queries ? std::min(count, visible(query * NUMBER) - tile) : 0;
        }
        weigh<AT_ONCE, NUMBER>(m.s + (r - strip) * QUANTIZED_TILE, m.q_steps + r, k_scales, v_scales, own,
                               a.scale, m.m + r / NUMBER, m.l + r / NUMBER * W,
                               reinterpret_cast<int16_t*>(m.weights + (r - strip) * QUANTIZED_TILE / 2),
                               m.steps + (r - strip), m.correction + (r - strip) / NUMBER);
      }
      for (int64_t d = 0; d < m.o_stride; d += PANEL) {
        for (int64_t r = strip; r < strip + STRIP; r += MR)
          if (seen(r) > 0) add_word_panels<T>(m, r, strip, (seen(r) + 1) / 2, tile_steps, d);
      }
    }
  }

  m.end_split();
  if (end > SPLIT_KEYS) {
    merge();
    m.keep_split();
  }
  for (int64_t r = 0; r < queries; ++r) {
    write_result<T>(a, b, t_begin + r / G, head * G + r % G, m.o + r * m.o_stride, m.m[r], m.l[r * W]);
  }
}

}  // namespace ISA
}  // namespace llama_fast
