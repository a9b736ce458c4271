// Decode (split-KV): so few query heads share a KV head that reading k and v from memory is what takes time.
//
// The sums are those of prefill.h, in the same order. Keys and values are used as they lie in memory: a
// square of keys and units is turned into columns in registers, so that a vector holds the scores of as
// many keys, and each of them is a sum of its own along D; values are added row by row. Both are fetched
// ahead, evenly, since memory that waits for arithmetic is lost: the scores of a tile are computed
// beside the values of the tile before it, and where the keys of a task end, those of the
// thread's next one are fetched. Each split of a row's keys is a task, so that a long context keeps all
// threads busy. The last split to be done merges them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "splits.h"

namespace llama_fast {
namespace ISA {

constexpr int STEP = vf::W == 1 ? 16 : 2 * vf::W;  // keys that are scored, and values added, in turn
constexpr int STREAMS = 2;                          // that are fetched: keys and values
constexpr int64_t KEYS_AHEAD = 2048, VALUES_AHEAD = 8192;  // bytes, how long before a step needs them
constexpr int ROWS_AT_ONCE = vf::W == 16 ? 8 : 4;   // queries whose sums stay in registers
static_assert(TILE % STEP == 0);

// Words of 4 bytes of a key: W of them are loaded, and each comes apart into its units.
template <class T> struct KeyWord {
  static constexpr int size = Unit<T>::size, units = 1;  // elements, and units
  template <class Width> static vf load(const T* p, Width width) { return Unit<T>::load(p, width); }
  static void units_of(vf word, vf (&x)[units]) { x[0] = word; }
};
#if defined(ISA_AVX2) || defined(ISA_AVX512)
template <> struct KeyWord<bf16> {
  static constexpr int size = 2, units = 2;
  // D is a multiple of 8: words are whole.
  static vf load(const bf16* p, Full) { return ISA::load(reinterpret_cast<const float*>(p)); }
  static vf load(const bf16* p, int n) { return ISA::load(reinterpret_cast<const float*>(p), n / 2); }
  static void units_of(vf word, vf (&x)[units]) { split(word, x[0], x[1]); }
};
#endif

// A run of `size` elements of a row of values as V vectors, in an order that `restore` turns into
// memory's; of Unit<T>::size rows, this one and the next, which is null for zeros.
template <class T> struct ValueRun {
  static constexpr int size = vf::W, V = 1;
  template <class Width> static void load(const T* p, const T*, vf (&x)[V], Width width) {
    x[0] = ISA::load(p, width);
  }
  static void restore(vf (&)[V]) {}
};
template <> struct ValueRun<bf16> {
  static constexpr int size = 2 * vf::W, V = 2;
#ifdef ISA_HAS_PAIRS
  template <class Width> static void load(const bf16* p, const bf16* next, vf (&x)[V], Width width) {
    using Row = Unit<bf16>;
    pair_rows(Row::load(p, width), next ? Row::load(next, width) : zero(), x[0], x[1]);
  }
  static void restore(vf (&x)[V]) { in_order(x[0], x[1], x[0], x[1]); }
#else
  static void load(const bf16* p, const bf16*, vf (&x)[V], Full) { load_split(p, x[0], x[1]); }
  static void load(const bf16* p, const bf16*, vf (&x)[V], int n) { load_split(p, x[0], x[1], n); }
  static void restore(vf (&x)[V]) { join(x[0], x[1], x[0], x[1]); }
#endif
};

// Calls f(e, width) for the runs of D elements.
template <int SIZE, class F> static inline void for_each_run(int64_t D, F&& f) {
  int64_t e = 0;
  for (; (e + 1) * SIZE <= D; ++e) f(e, Full{});
  if (e * SIZE < D) f(e, int(D - e * SIZE));
}

// Rows of keys or values; row i + 1 is `stride` elements behind row i.
template <class T> struct Tile {
  const T* data;
  int64_t stride;
  int64_t count;
  const T* row(int64_t i) const { return data + i * stride; }
};

// Rows to fetch into the caches, of all streams in turn: the CPU fetches further ahead by itself in
// each of them, but only within a page, so several keep more of it on the way.
template <class T> struct Ahead {
  Tile<T> of[STREAMS] = {};
  // In step j the elements [begin, end) of a row of one of them. Inlined, since GCC takes a call that only
  // fetches for one without effect.
  [[gnu::always_inline]] void fetch(int64_t j, int64_t begin, int64_t end) const {
    const Tile<T>& tile = of[j % STREAMS];
    if (j / STREAMS >= tile.count) return;
    constexpr int64_t line = 64 / int64_t(sizeof(T));
    for (int64_t d = round_up(begin, line); d < end; d += line)
      __builtin_prefetch(tile.row(j / STREAMS) + d);
  }
};

// The keys [begin, end) of a KV head of a row of the batch. None at all if default.
template <class T> struct Span {
  const T *k = nullptr, *v = nullptr;  // of the first key
  int64_t k_stride = 0, v_stride = 0, begin = 0, count = 0;

  Span() = default;
  Span(const AttentionArgs& a, int64_t b, int64_t head, int64_t begin_key, int64_t end_key)
      : k(a.k.at<const T>(b, begin_key) + head * a.k.stride.h),
        v(a.v.at<const T>(b, begin_key) + head * a.v.stride.h),
        k_stride(a.k.stride.t),
        v_stride(a.v.stride.t),
        begin(begin_key),
        count(end_key - begin_key) {}

  // Up to n rows from the j-th on.
  Tile<T> keys(int64_t j, int64_t n) const { return {k + j * k_stride, k_stride, rows(j, n)}; }
  Tile<T> values(int64_t j, int64_t n) const { return {v + j * v_stride, v_stride, rows(j, n)}; }

 private:
  int64_t rows(int64_t j, int64_t n) const { return std::clamp<int64_t>(count - j, 0, n); }
};

// s[r, j] = q[r] · k[j] for R queries and up to STEP keys, and a step of `ahead` for each.
template <class T, int R>
static void score_keys(const float* q, int64_t q_stride, Tile<T> k, int64_t D, float* s,
                       const Ahead<T>& ahead) {
  using Word = KeyWord<T>;
  constexpr int W = vf::W;
  const T* row[STEP];  // behind the last key, the last one again
  for (int i = 0; i < STEP; ++i) row[i] = k.row(std::min<int64_t>(i, k.count - 1));
  for_each_run<W * Word::size>(D, [&](int64_t e, auto width) {
    const int64_t begin = e * W * Word::size;
    // In turn, so that the sums of some keys do not wait for each other.
    for (int first = 0; first < k.count; first += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = Word::load(row[first + i] + begin, width);
      for (int i = 0; i < W; ++i) ahead.fetch(first + i, begin, begin + W * Word::size);
      transpose(x);
      vf total[R];
      for (int r = 0; r < R; ++r) total[r] = e ? load(s + r * TILE + first) : zero();
      const float* y = q + e * W * Word::units;
      for (int i = 0; i < W; ++i) {
        vf units[Word::units];
        Word::units_of(x[i], units);
        for (int n = 0; n < Word::units; ++n) {
          for (int r = 0; r < R; ++r)
            total[r] = Unit<T>::madd(set(y[r * q_stride + i * Word::units + n]), units[n], total[r]);
        }
      }
      for (int r = 0; r < R; ++r) store(s + r * TILE + first, total[r]);
    }
  });
}

// sums_of[r] += weights[r] · v, for R queries, up to STEP rows of v and C runs of them from element d on,
// where `fresh` from 0; and of each step of `ahead` these elements.
template <class T, int R, int C, class Width>
static void add_runs(const float* weights, Tile<T> v, int64_t d, Width width, bool fresh,
                     float* sums_of, int64_t stride, const Ahead<T>& ahead) {
  using Value = ValueRun<T>;
  constexpr int W = vf::W, V = Value::V, SIZE = Unit<T>::size;
  vf total[R][C * V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * V; ++i)
      total[r][i] = fresh ? zero() : load(sums_of + r * stride + i * W);
  }
  for (int64_t j = 0; j < v.count; j += SIZE) {
    const T* row = v.row(j) + d;
    const T* next = j + 1 < v.count ? row + v.stride : nullptr;
    vf x[C][V];
    for (int c = 0; c < C; ++c) {
      const int64_t at = c * Value::size;
      Value::load(row + at, next ? next + at : nullptr, x[c], width);
    }
    for (int i = 0; i < SIZE; ++i) ahead.fetch(j + i, d, d + C * Value::size);
    for (int r = 0; r < R; ++r) {
      const vf w = set(weights[r * TILE + j / SIZE]);
      for (int i = 0; i < C * V; ++i) total[r][i] = Unit<T>::madd(w, x[i / V][i % V], total[r][i]);
    }
  }
  // Without the pragmas GCC 12 takes the sums out of the registers for these loops.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * V; ++i) store(sums_of + r * stride + i * W, total[r][i]);
  }
}

// The same for all of D, from element d on: C runs at a time, then half as many.
template <class T, int R, int C>
static void add_values(const float* weights, Tile<T> v, int64_t D, bool fresh, float* sums_of,
                       int64_t stride, const Ahead<T>& ahead, int64_t d = 0) {
  constexpr int64_t size = ValueRun<T>::size;
  for (; d + C * size <= D; d += C * size)
    add_runs<T, R, C>(weights, v, d, Full{}, fresh, sums_of + d, stride, ahead);
  if constexpr (C > 1)
    add_values<T, R, C / 2>(weights, v, D, fresh, sums_of, stride, ahead, d);
  else if (d < D)
    add_runs<T, R, 1>(weights, v, d, int(D - d), fresh, sums_of + d, stride, ahead);
}

// The working memory of decode, besides its result. Both begin at a line of the caches: vectors
// that lie in two of them cost the values a tenth more.
static inline int64_t decode_floats(int64_t rows, int64_t D) {
  return rows * (round_up(D, 2 * vf::W) + Partial::stride_for(D) + 2 * TILE + 1);
}

// Calls f(r, number) for groups of `rows` queries.
template <int MOST, class F> static inline void for_each_group(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + MOST <= rows; r += MOST) f(r, std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1)
    if (r < rows) for_each_group<MOST / 2>(rows - r, [&](int64_t i, auto number) { f(r + i, number); });
}

// The queries of a row of the batch and a KV head, query by query and head by head, over a span of
// its keys, whose first keys are `fetched`, or not. follow() is called once, towards the end, and
// returns the span whose first keys are fetched then.
template <class T, class F>
static void decode(const AttentionArgs& a, const Row& row, int64_t b, int64_t head,
                   const Span<T>& span, bool fetched, F&& follow, float* memory,
                   const Partial& result) {
  using Value = ValueRun<T>;
  constexpr int W = vf::W;
  const int64_t G = a.H / a.K, D = a.D, rows = row.queries * G, stride = result.stride;
  const int64_t q_stride = round_up(D, 2 * W);
  float* q = memory;
  float* tile_sums = q + rows * q_stride;
  float* scores = tile_sums + rows * stride;  // of two tiles; the weights of one take their place
  float* correction = scores + 2 * rows * TILE;

  for (int64_t r = 0; r < rows; ++r) {
    const T* from = a.q.at<const T>(b, row.first + r / G) + (head * G + r % G) * a.q.stride.h;
    for (int64_t u = 0; u < q_stride; u += W) store(q + r * q_stride + u, zero());
    put_units(from, D, q + r * q_stride);
    result.m[r] = -std::numeric_limits<float>::infinity();
    result.l[r] = 0.f;
    for (int64_t d = 0; d < stride; d += W) store(result.sums_of + r * stride + d, zero());
  }

  // Of the keys from the j-th on, how many a query sees, or none and less.
  auto own = [&](int64_t r, int64_t j) {
    return std::min(span.count, row.visible(a, row.first + r / G) - span.begin) - j;
  };
  auto scores_of = [&](int64_t r, int64_t j) {
    return scores + (j / TILE % 2 * rows + r) * TILE + j % TILE;
  };

  auto score = [&](int64_t j, const Ahead<T>& ahead) {
    for_each_group<ROWS_AT_ONCE>(rows, [&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      const Tile<T> k = span.keys(j, std::clamp<int64_t>(own(r + R - 1, j), 0, STEP));
      // The other groups read the same.
      if (k.count > 0)
        score_keys<T, R>(q + r * q_stride, q_stride, k, D, scores_of(r, j), r ? Ahead<T>{} : ahead);
    });
  };
  auto weigh = [&](int64_t tile) {
    for (int64_t r = 0; r < rows; ++r)
      correction[r] = softmax_part<T>(scores_of(r, tile), std::min<int64_t>(own(r, tile), TILE), 0,
                                      a.scale, result.m[r], result.l[r]);
  };
  auto add_some = [&](int64_t r, auto number, int64_t j, int64_t count, const Ahead<T>& ahead) {
    constexpr int R = decltype(number)::value;
    constexpr int SUMS = std::min(8, (W == 16 ? 16 : 8) / R);  // of a query, in registers
    const float* weights = scores_of(r, j - j % TILE) + j % TILE / Unit<T>::size;
    if (count > 0)
      add_values<T, R, std::max(1, SUMS / Value::V)>(weights, span.values(j, count), D, j % TILE == 0,
                                                     tile_sums + r * stride, stride, ahead);
  };
  auto add = [&](int64_t j, const Ahead<T>& ahead) {
    auto count = [&](int64_t r) { return std::clamp<int64_t>(own(r, j), 0, STEP); };
    for_each_group<ROWS_AT_ONCE>(rows, [&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      const Ahead<T>& its = r ? Ahead<T>{} : ahead;
      if (count(r) == count(r + R - 1)) return add_some(r, number, j, count(r), its);
      // A value that a query does not see must not reach it, be it NaN.
      for (int i = 0; i < R; ++i)
        add_some(r + i, std::integral_constant<int, 1>{}, j, count(r + i), i ? Ahead<T>{} : its);
    });
  };
  auto add_tile = [&](int64_t tile) {
    for (int64_t r = 0; r < rows; ++r) {
      if (own(r, tile) <= 0) continue;
      const vf factor = set(correction[r]);
      float* to = result.sums_of + r * stride;
      const float* from = tile_sums + r * stride;
      for (int64_t d = 0; d < D; d += W) store(to + d, fma(load(to + d), factor, load(from + d)));
    }
  };

  // Where fetching is. Each step takes STEP keys and, once their tile is weighed, as many values: half
  // of them, and of the next ones to be fetched, in each of both.
  constexpr int HALF = STEP / 2;
  const int64_t row_bytes = D * int64_t(sizeof(T));
  int64_t next_key = std::min(span.count, TILE + STEP + KEYS_AHEAD / row_bytes), next_value = 0;
  Span<T> next;
  bool followed = false;
  auto fetch_keys = [&] {
    if (next_key >= span.count && !followed) {
      next = follow();
      followed = true;
    }
    const Tile<T> keys = followed ? next.keys(next_key - span.count, HALF) : span.keys(next_key, HALF);
    next_key += followed ? HALF : keys.count;
    return keys;
  };
  auto fetch_values = [&](int64_t n) {
    const Tile<T> values = span.values(next_value, n);
    next_value += n;
    return values;
  };

  if (!fetched) {
    const Ahead<T> first{{span.keys(0, next_key)}};
    for (int64_t j = 0; j < next_key; ++j) first.fetch(j * STREAMS, 0, D);
  }
  const int64_t end = span.count, first_values = std::min<int64_t>(HALF, VALUES_AHEAD / row_bytes);
  for (int64_t j = 0; j < std::min<int64_t>(TILE, end); j += STEP)
    score(j, {{{}, fetch_values(first_values)}});
  weigh(0);
  for (int64_t j = 0; j < end; j += STEP) {
    const bool more = j + TILE < end;
    const Tile<T> keys = fetch_keys();
    add(j, {{keys, fetch_values(HALF)}});
    const Tile<T> more_keys = fetch_keys(), more_values = fetch_values(HALF);
    if (more) score(j + TILE, {{more_keys, more_values}});
    const int64_t tile = j - j % TILE;
    if ((j + STEP) % TILE == 0 || j + STEP >= end) {
      add_tile(tile);
      if (tile + TILE < end) weigh(tile + TILE);
    }
  }
  if (!followed) follow();

  for (int64_t r = 0; r < rows; ++r) {
    for_each_run<Value::size>(D, [&](int64_t e, auto) {
      float* at = result.sums_of + r * stride + e * Value::size;
      vf x[Value::V];
      for (int v = 0; v < Value::V; ++v) x[v] = load(at + v * W);
      Value::restore(x);
      for (int v = 0; v < Value::V; ++v) store(at + v * W, x[v]);
    });
  }
}

}  // namespace ISA
}  // namespace llama_fast
