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
constexpr int FETCHES = STEP / 2;                   // of keys and of values, beside either
constexpr int64_t PAGE = 4096;                      // bytes, within which the CPU fetches ahead by itself
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

// Rows of keys and of values to fetch into L2.
template <class T> struct Ahead {
  static constexpr int64_t LINE = 64 / int64_t(sizeof(T));  // elements of a line of the caches
  const T *keys = nullptr, *values = nullptr;
  int64_t keys_stride = 0, values_stride = 0, rows = 0;

  Ahead() = default;
  // Where one has no rows those of the other are fetched twice, which costs less than to ask each time.
  Ahead(Tile<T> k, Tile<T> v) : rows(std::max(k.count, v.count)) {
    if (k.count == 0) k = v;
    if (v.count == 0) v = k;
    keys = k.data, keys_stride = k.stride;
    values = v.data, values_stride = v.stride;
  }
  // Whether there is anything to fetch of the elements from d on: lines begin at multiples of their size.
  bool any(int64_t d) const { return rows && d % LINE == 0; }
  // Of the i-th rows the elements [begin, end). A row behind the last does no harm, so none is asked for.
  // Inlined, since GCC takes a call that only fetches for one without effect.
  [[gnu::always_inline]] void fetch(int64_t i, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += LINE) {
      __builtin_prefetch(keys + i * keys_stride + d, 0, 2);
      __builtin_prefetch(values + i * values_stride + d, 0, 2);
    }
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

// s[r, j] = q[r] · k[j] for R queries and up to STEP keys, and all of `ahead` meanwhile.
template <class T, int R>
static void score_keys(const float* q, int64_t q_stride, Tile<T> k, int64_t D, float* s,
                       const Ahead<T>& ahead) {
  using Word = KeyWord<T>;
  constexpr int W = vf::W, RUN = W * Word::size, BLOCKS = STEP / W;
  const T* row[STEP];  // behind the last key, the last one again
  for (int i = 0; i < STEP; ++i) row[i] = k.row(std::min<int64_t>(i, k.count - 1));
  vf total[R][BLOCKS];
  for (auto& of_query : total)
    for (vf& t : of_query) t = zero();
  for_each_run<RUN>(D, [&](int64_t e, auto width) {
    const bool fetch = ahead.any(e * RUN);
    vf columns[W][BLOCKS];
    for (int block = 0; block < BLOCKS; ++block) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = Word::load(row[block * W + i] + e * RUN, width);
      transpose(x);
      for (int i = 0; i < W; ++i) columns[i][block] = x[i];
    }
    const float* y = q + e * W * Word::units;
    for (int i = 0; i < W; ++i) {
      vf units[BLOCKS][Word::units];
      for (int block = 0; block < BLOCKS; ++block) Word::units_of(columns[i][block], units[block]);
      if (fetch)
        for (int n = 0; n < FETCHES / W; ++n)
          ahead.fetch(i * (FETCHES / W) + n, e * RUN, (e + 1) * RUN);
      for (int n = 0; n < Word::units; ++n) {
        for (int r = 0; r < R; ++r) {
          const vf of_query = set(y[r * q_stride + i * Word::units + n]);
          for (int block = 0; block < BLOCKS; ++block)
            total[r][block] = Unit<T>::madd(of_query, units[block][n], total[r][block]);
        }
      }
    }
  });
  for (int r = 0; r < R; ++r)
    for (int block = 0; block < BLOCKS; ++block) store(s + r * TILE + block * W, total[r][block]);
}

// sums_of[r] += weights[r] · v, for R queries, up to STEP rows of v and C runs of them from element d on,
// where `fresh` from 0; and these elements of `ahead` meanwhile.
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
  const bool fetch = ahead.any(d);
  for (int64_t j = 0; j < v.count; j += SIZE) {
    const T* row = v.row(j) + d;
    const T* next = j + 1 < v.count ? row + v.stride : nullptr;
    vf x[C][V];
    for (int c = 0; c < C; ++c) {
      const int64_t at = c * Value::size;
      Value::load(row + at, next ? next + at : nullptr, x[c], width);
    }
    if (fetch && j % 2 == 0) ahead.fetch(j / 2, d, d + C * Value::size);
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

// Calls f(r, number) for groups of up to MOST of `rows` queries.
template <int MOST, class F> static inline void for_each_group(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + MOST <= rows; r += MOST) f(r, std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1)
    if (r < rows) for_each_group<MOST / 2>(rows - r, [&](int64_t i, auto number) { f(r + i, number); });
}

// The queries of a row of the batch and a KV head, query by query and head by head, over a span of
// its keys, which is scored, weighed and added tile by tile. Keys are counted from the span's first.
template <class T> class Decode {
 public:
  const Span<T> span;
  const Partial result;

  // Both memory and the result begin at a line of the caches: vectors that lie in two of them cost the
  // values a tenth more.
  Decode(const AttentionArgs& args, const Row& its_row, int64_t b, int64_t head, const Span<T>& keys,
         float* memory, const Partial& its_result)
      : span(keys),
        result(its_result),
        a(args),
        row(its_row),
        G(a.H / a.K),
        rows(row.queries * G),
        stride(result.stride),
        q(memory),
        tile_sums(q + rows * stride),
        scores(tile_sums + rows * stride),
        correction(scores + 2 * rows * TILE) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = a.q.at<const T>(b, row.first + r / G) + (head * G + r % G) * a.q.stride.h;
      std::fill(q + r * stride, q + (r + 1) * stride, 0.f);
      put_units(from, a.D, q + r * stride);
      result.m[r] = -std::numeric_limits<float>::infinity();
      result.l[r] = 0.f;
    }
    std::fill(result.sums_of, result.sums_of + rows * stride, 0.f);
  }
  int64_t row_bytes() const { return a.D * int64_t(sizeof(T)); }
  static int64_t floats(int64_t rows, int64_t D) {
    return round_up(rows * (2 * Partial::stride_for(D) + 2 * TILE + 1), 16);
  }

  // STEP keys from the j-th on.
  void score(int64_t j, const Ahead<T>& ahead) {
    for_each_group<ROWS_AT_ONCE>(rows, [&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      const Tile<T> k = span.keys(j, seen(r + R - 1, j, STEP));
      // The other groups read the same.
      if (k.count > 0)
        score_keys<T, R>(q + r * stride, stride, k, a.D, scores_of(r, j), r ? Ahead<T>{} : ahead);
    });
  }
  // The keys of a tile that are scored.
  void weigh(int64_t tile) {
    for (int64_t r = 0; r < rows; ++r)
      correction[r] = softmax_part<T>(scores_of(r, tile), seen(r, tile, TILE), 0, a.scale, result.m[r],
                                      result.l[r]);
  }
  // STEP values from the j-th on, whose tile is weighed.
  void add(int64_t j, const Ahead<T>& ahead) {
    for_each_group<ROWS_AT_ONCE>(rows, [&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      const Ahead<T> its = r ? Ahead<T>{} : ahead;
      const int64_t count = seen(r, j, STEP);
      if (count == seen(r + R - 1, j, STEP)) return add_some<R>(r, j, count, its);
      // A value that a query does not see must not reach it, be it NaN.
      for (int i = 0; i < R; ++i)
        add_some<1>(r + i, j, seen(r + i, j, STEP), i ? Ahead<T>{} : its);
    });
  }
  // The values of a tile are added.
  void end_tile(int64_t tile) {
    for (int64_t r = 0; r < rows; ++r) {
      if (seen(r, tile, TILE) == 0) continue;
      const vf factor = set(correction[r]);
      float* to = result.sums_of + r * stride;
      const float* from = tile_sums + r * stride;
      for (int64_t d = 0; d < stride; d += vf::W) store(to + d, fma(load(to + d), factor, load(from + d)));
    }
  }
  // All values are added.
  void end() {
    using Value = ValueRun<T>;
    for (int64_t r = 0; r < rows; ++r) {
      for_each_run<Value::size>(a.D, [&](int64_t e, auto) {
        float* at = result.sums_of + r * stride + e * Value::size;
        vf x[Value::V];
        for (int v = 0; v < Value::V; ++v) x[v] = load(at + v * vf::W);
        Value::restore(x);
        for (int v = 0; v < Value::V; ++v) store(at + v * vf::W, x[v]);
      });
    }
  }

 private:
  const AttentionArgs& a;
  const Row& row;
  const int64_t G, rows, stride;
  float *q, *tile_sums;
  float* scores;  // of two tiles; the weights of one take their place
  float* correction;

  // How many of n keys from the j-th on a query sees.
  int64_t seen(int64_t r, int64_t j, int64_t n) const {
    const int64_t visible = row.visible(a, row.first + r / G) - span.begin;
    return std::clamp<int64_t>(std::min(span.count, visible) - j, 0, n);
  }
  float* scores_of(int64_t r, int64_t j) const {
    return scores + (j / TILE % 2 * rows + r) * TILE + j % TILE;
  }
  template <int R> void add_some(int64_t r, int64_t j, int64_t count, const Ahead<T>& ahead) {
    constexpr int SUMS = std::min(8, (vf::W == 16 ? 16 : 8) / R);  // of a query, in registers
    const float* weights = scores_of(r, j - j % TILE) + j % TILE / Unit<T>::size;
    if (count > 0)
      add_values<T, R, std::max(1, SUMS / ValueRun<T>::V)>(weights, span.values(j, count), a.D,
                                                           j % TILE == 0, tile_sums + r * stride, stride,
                                                           ahead);
  }
};

// Where the fetching of keys, or of values, is: in the span of a task, then in that of the next. Rows are
// fetched a window of FETCHES pages ahead, and a row of each of its pages in turn: in each the CPU
// fetches on by itself, but not beyond it, so several keep more of memory on the way.
struct Fetching {
  const int64_t turns, window;  // rows of a page, and of all
  int64_t at;
  bool in_next = false;

  // A thread's first window is left to the CPU: for few keys, which often are in a cache, to fetch it costs
  // more than it gains.
  explicit Fetching(int64_t row_bytes)
      : turns(std::max<int64_t>(1, PAGE / row_bytes)), window(turns * FETCHES), at(window) {}

  // The next rows, FETCHES or fewer.
  template <class T, class Next, class Get>
  Tile<T> rows(const Decode<T>& task, Next&& next, Get&& get) {
    if (!in_next && at >= task.span.count) {
      in_next = true;
      at = 0;
    }
    const Decode<T>* of = in_next ? next() : &task;
    if (!of) return {};
    const int64_t begin = at - at % window;
    Tile<T> tile = get(of->span, at, FETCHES);
    if (begin + window <= of->span.count) {
      tile = get(of->span, begin + at % window / FETCHES, FETCHES);
      tile.stride *= turns;
    }
    at += tile.count;
    return tile;
  }
  void begin_next() {
    if (!in_next) at = 0;
    in_next = false;
  }
};

// Tasks one after another, from `task` on. follow() returns the next one, or null, some time before the
// last is at its end; end(task) is called when its sums are complete.
template <class T, class Follow, class End>
static void decode(Decode<T>* task, Follow&& follow, End&& end) {
  Decode<T>* following = nullptr;
  bool asked = false;
  auto next = [&] {
    if (!asked) following = follow();
    asked = true;
    return following;
  };
  Fetching keys(task->row_bytes()), values(task->row_bytes());
  auto next_keys = [&] {
    return keys.rows(*task, next, [](auto& span, int64_t j, int64_t n) { return span.keys(j, n); });
  };
  auto next_values = [&] {
    return values.rows(*task, next, [](auto& span, int64_t j, int64_t n) { return span.values(j, n); });
  };
  auto next_of_both = [&] {
    const Tile<T> rows = next_keys();
    return Ahead<T>(rows, next_values());
  };

  for (int64_t j = 0; j < std::min<int64_t>(TILE, task->span.count); j += STEP) {
    const Tile<T> rows = next_keys();
    task->score(j, {rows, next_keys()});
  }
  task->weigh(0);
  while (task) {
    const int64_t count = task->span.count;
    for (int64_t tile = 0; tile < count; tile += TILE) {
      // The next tile is scored meanwhile.
      const bool last = tile + TILE >= count;
      Decode<T>* scored = last ? next() : task;
      const int64_t first = last ? 0 : tile + TILE;
      const int64_t scores = scored ? std::min<int64_t>(TILE, scored->span.count - first) : 0;
      const int64_t added = std::min<int64_t>(TILE, count - tile);
      for (int64_t j = 0; j < std::max(added, scores); j += STEP) {
        if (j < added) task->add(tile + j, next_of_both());
        if (j < scores) scored->score(first + j, next_of_both());
      }
      task->end_tile(tile);
      if (scored) scored->weigh(first);
    }
    task->end();
    end(*task);
    task = next();
    asked = false;
    keys.begin_next();
    values.begin_next();
  }
}

}  // namespace ISA
}  // namespace llama_fast
