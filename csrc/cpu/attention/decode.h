// Decode (split-KV): so few query heads share a KV head that reading k and v from memory is what takes time.
//
// Keys and values are used as they lie in memory, a tile at a time, for up to four query heads at
// once. They are fetched ahead, evenly, since memory that waits for arithmetic is lost, and from
// several places at once: tiles come from the first and the second half of the keys in turn, and
// where the keys of a task end, those of the thread's next one are fetched. A tile's scores are
// computed before the values of the tile before it are added, so that neither waits for a softmax.
// Sums are scaled down only where a score outgrows the largest one so far by SLACK. A row's keys are
// split by a length that depends on that row alone, so that a long context keeps all
// threads busy, and neither the number of threads nor the other rows change a result. The last split
// to be done merges them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../kernel_choice.h"
#include "../parallel.h"
#include "softmax.h"

namespace llama_fast {
namespace ISA {

constexpr int DECODE_TILE = 16;            // keys: a vector of scores for each query, where W is 16
constexpr int SECTIONS = 2;             // of a part's keys, whose tiles take turns
constexpr int STREAMS = 2 * SECTIONS;   // that are fetched: k and v of each section
constexpr int64_t FETCH_BYTES = 2048;   // of a stream, how long before it is needed
constexpr float SLACK = 2.f;            // weights are at most 2^(3 · SLACK), see ScoreScale

// A run of `size` elements of a row as V vectors, in an order that `restore` turns into memory's.
template <class T> struct Run {
  static constexpr int size = vf::W, V = 1;
  template <class Width> static void load(const T* p, vf (&x)[V], Width width) {
    x[0] = ISA::load(p, width);
  }
  static void restore(vf (&)[V]) {}
};
template <> struct Run<bf16> {
  static constexpr int size = 2 * vf::W, V = 2;
  static void load(const bf16* p, vf (&x)[V], Full) { load_split(p, x[0], x[1]); }
  static void load(const bf16* p, vf (&x)[V], int n) { load_split(p, x[0], x[1], n); }
  static void restore(vf (&x)[V]) { join(x[0], x[1], x[0], x[1]); }
};

template <class T> struct KeyRun : Run<T> {};
template <class T> struct ValueRun : Run<T> {
  // Elements of Unit<T>::size rows, this one and the next.
  template <class Width>
  static void load(const T* p, int64_t, vf (&x)[Run<T>::V], Width width) {
    Run<T>::load(p, x, width);
  }
};
#ifdef ISA_HAS_PAIRS
template <> struct KeyRun<bf16> {
  static constexpr int size = 2 * vf::W, V = 1;
  static void load(const bf16* p, vf (&x)[V], Full) { x[0] = load_pairs(p); }
  static void load(const bf16* p, vf (&x)[V], int n) { x[0] = load_pairs(p, n); }
};
template <> struct ValueRun<bf16> {
  static constexpr int size = 2 * vf::W, V = 2;
  static void load(const bf16* p, int64_t next, vf (&x)[V], Full) {
    pair_rows(load_pairs(p), load_pairs(p + next), x[0], x[1]);
  }
  static void load(const bf16* p, int64_t next, vf (&x)[V], int n) {
    pair_rows(load_pairs(p, n), load_pairs(p + next, n), x[0], x[1]);
  }
  static void restore(vf (&x)[V]) { in_order(x[0], x[1], x[0], x[1]); }
};
#endif

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
  Tile<T> of[STREAMS];
  // In step j the elements [begin, end) of a row of one of them.
  void fetch(int64_t j, int64_t begin, int64_t end) const {
    const Tile<T>& tile = of[j % STREAMS];
    if (j / STREAMS >= tile.count) return;
    for (int64_t d = begin; d < end; d += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(tile.row(j / STREAMS) + d);
  }
};

// The keys [begin, end) of a KV head of a row of the batch, in tiles that the sections hold in turn.
// None at all if default.
template <class T> struct Span {
  const T *k = nullptr, *v = nullptr;  // of the head
  int64_t k_stride = 0, v_stride = 0, begin = 0, end = 0;
  int64_t tiles = 0, section = 0;  // keys of a section; the last one may have fewer

  Span() = default;
  Span(const AttentionArgs& a, int64_t b, int64_t head, int64_t begin_key, int64_t end_key)
      : k(static_cast<const T*>(a.k.data) + b * a.k.stride.b + head * a.k.stride.h),
        v(static_cast<const T*>(a.v.data) + b * a.v.stride.b + head * a.v.stride.h),
        k_stride(a.k.stride.t),
        v_stride(a.v.stride.t),
        begin(begin_key),
        end(end_key),
        tiles((end - begin + DECODE_TILE - 1) / DECODE_TILE),
        section((tiles + SECTIONS - 1) / SECTIONS * DECODE_TILE) {}

  int64_t tile(int64_t i) const {
    return begin + i % SECTIONS * section + i / SECTIONS * DECODE_TILE;
  }
  Tile<T> keys(int64_t j, int64_t count) const { return {k + j * k_stride, k_stride, count}; }
  Tile<T> values(int64_t j, int64_t count) const { return {v + j * v_stride, v_stride, count}; }
  // A tile of a stream, or what it has of it, from key j of its section on.
  Tile<T> stream(int n, int64_t j) const {
    const int64_t at = begin + n / 2 * section + j;
    const int64_t count =
        std::clamp<int64_t>(std::min(section - j, end - at), 0, DECODE_TILE);
    return n % 2 ? values(at, count) : keys(at, count);
  }
};

// s[r, j] = q[r] · k[j] for R queries and the keys of a tile, a step of `ahead` for each. KEYS at a
// time leave registers for the rest; the sums of a block of them fill a vector.
template <class T, int R>
static void score_tile(const float* q, int64_t q_stride, Tile<T> k, int64_t D, float* s,
                       const Ahead<T>& ahead) {
  using Key = KeyRun<T>;
  constexpr int W = vf::W, V = Key::V;
  constexpr int KEYS = W == 1 ? 1 : W / 4, TURNS = W == 1 ? 1 : 4 / R, BLOCK = KEYS * TURNS;
  for (int64_t j = 0; j < k.count; j += BLOCK) {
    vf total[std::max(W, R)];
    for (vf& t : total) t = zero();
    for (int turn = 0; turn < TURNS; ++turn) {
      const int64_t first = j + turn * KEYS;
      for (int i = 0; i < KEYS; ++i) ahead.fetch(first + i, 0, D);
      const T* row[KEYS];  // behind the last key, the last one again
      for (int i = 0; i < KEYS; ++i) row[i] = k.row(std::min(first + i, k.count - 1));
      vf earlier[R] = {};  // of a scalar build, which sums one by one: two levels keep it exact
      for_each_run<Key::size>(D, [&](int64_t e, auto width) {
        vf x[KEYS][V];
        for (int i = 0; i < KEYS; ++i) Key::load(row[i] + e * Key::size, x[i], width);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < V; ++v) {
            const vf y = load(q + r * q_stride + (e * V + v) * W);
            for (int i = 0; i < KEYS; ++i) {
              vf& t = total[r * BLOCK + turn * KEYS + i];
              t = Unit<T>::madd(x[i][v], y, t);
            }
          }
        }
        if constexpr (W == 1) {
          if (e % 16 == 15) {
            for (int r = 0; r < R; ++r) {
              earlier[r] = earlier[r] + total[r];
              total[r] = zero();
            }
          }
        }
      });
      if constexpr (W == 1)
        for (int r = 0; r < R; ++r) total[r] = earlier[r] + total[r];
    }
    float sums_of[std::max(W, R)];
    if constexpr (W == 1)
      for (int r = 0; r < R; ++r) store(sums_of + r, total[r]);
    else
      store(sums_of, sums(total));
    for (int r = 0; r < R; ++r)
      std::memcpy(s + r * DECODE_TILE + j, sums_of + r * BLOCK, BLOCK * sizeof(float));
  }
}

// Turns a query's scores s of a tile into weights 2^((unit · s - m) · rest), in units of T, zeros
// behind the first `count`, and adds them to the lanes of `l`. `m` stays the largest unit · s, but for
// SLACK: where it grows, what was summed under the old one is rescaled (l, and the
// `stride` elements of sums_of).
template <class T>
static void weigh_tile(float* s, int64_t count, const ScoreScale& scale, float& m, float* l,
                       float* sums_of, int64_t stride, float* weights_of) {
  using Weight = typename std::conditional<Unit<T>::size == 2, T, float>::type;
  Weight* weights = reinterpret_cast<Weight*>(weights_of);
  constexpr int W = vf::W;
  for (int64_t i = std::max<int64_t>(count, 0); i < DECODE_TILE; ++i)
    s[i] = count > 0 ? s[count - 1] : 0.f;
  if (count > 0) {
    const vf unit = set(scale.unit);
    vf largest = load(s) * unit;
    for (int i = W; i < DECODE_TILE; i += W) largest = max(largest, load(s + i) * unit);
    if (any_above(largest, set(m + SLACK))) {
      const float before = m;
      m = max_of(largest);
      const vf correction = set(correction_of(before, scale, m));
      store(l, load(l) * correction);
      for (int64_t d = 0; d < stride; d += W) store(sums_of + d, load(sums_of + d) * correction);
    }
  }
  const float base = base_of(m);
  vf sum_of = zero();
  for (int i = 0; i < DECODE_TILE; i += W) {
    vf x = weight_of(load(s + i), scale, base);
    if (i + W > count) {
      float lanes[W];
      store(lanes, x);
      x = count > i ? load(lanes, int(count - i)) : zero();
    }
    sum_of = sum_of + x;
    store(weights + i, x);
  }
  store(l, load(l) + sum_of);
}

// o[r] += weights[r] · v, for R queries and C runs of v from element d on; and of each step of `ahead`
// these elements.
template <class T, int R, int C, class Width>
static void add_runs(const float* weights, Tile<T> v, int64_t d, Width width, float* o,
                     int64_t o_stride, const Ahead<T>& ahead) {
  using Value = ValueRun<T>;
  constexpr int W = vf::W, V = Value::V, STEP = Unit<T>::size;
  vf total[R][C * V];
  for (auto& row : total)  // a tile by itself: sums of sums stay exact
    for (vf& t : row) t = zero();
  for (int64_t j = 0; j < v.count; j += STEP) {
    // An odd last row is paired with itself, under a weight of zero.
    const int64_t next = j + 1 < v.count ? v.stride : 0;
    vf x[C][V];
    for (int c = 0; c < C; ++c) Value::load(v.row(j) + d + c * Value::size, next, x[c], width);
    for (int i = 0; i < STEP; ++i) ahead.fetch(j + i, d, d + C * Value::size);
    for (int r = 0; r < R; ++r) {
      const vf w = set(weights[r * DECODE_TILE + j / STEP]);
      for (int i = 0; i < C * V; ++i) total[r][i] = Unit<T>::madd(w, x[i / V][i % V], total[r][i]);
    }
  }
  // Without the pragmas GCC 12 takes the sums out of the registers for these loops.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * V; ++i) {
      float* at = o + r * o_stride + i * W;
      store(at, load(at) + total[r][i]);
    }
  }
}

// The same for all of D, from element d on: C runs at a time, then half as many.
template <class T, int R, int C>
static void add_tile(const float* weights, Tile<T> v, int64_t D, float* o, int64_t o_stride,
                     const Ahead<T>& ahead, int64_t d = 0) {
  constexpr int64_t size = ValueRun<T>::size;
  for (; d + C * size <= D; d += C * size)
    add_runs<T, R, C>(weights, v, d, Full{}, o + d, o_stride, ahead);
  if constexpr (C > 1)
    add_tile<T, R, C / 2>(weights, v, D, o, o_stride, ahead, d);
  else if (d < D)
    add_runs<T, R, 1>(weights, v, d, int(D - d), o + d, o_stride, ahead);
}

// Whether a row of the batch is decoded, its G query heads to a KV head: otherwise it is a prefill.
static inline bool is_decode(const Row& row, int64_t G) {
  return row.queries <= 1 || row.queries * G <= DECODE_ROWS;
}
// Keys of a split of the row, in whole tiles.
static inline int64_t split_keys(const Row& row, int64_t tile) {
  return std::max(SPLIT_KEYS, round_up((row.keys + MAX_SPLITS - 1) / MAX_SPLITS, tile));
}
static inline int64_t attention_threads(int64_t multiply_adds) {
  return std::min(max_threads(), 1 + multiply_adds / THREAD_WORK);
}

// What is known of some queries after a KV split: sums (rows, stride), and of each query the largest
// exponent m and the sum l of the weights.
struct Partial {
  float *sums_of, *m, *l;
  int64_t stride;

  static int64_t stride_for(int64_t D) { return round_up(D, 2 * vf::W); }
  static int64_t floats(int64_t rows, int64_t D) {
    return round_up(rows * (stride_for(D) + 2), 16);  // whole lines: see decode_floats
  }
  Partial(float* memory, int64_t rows, int64_t D)
      : sums_of(memory),
        m(memory + rows * stride_for(D)),
        l(m + rows),
        stride(stride_for(D)) {}
};

// The working memory of decode, besides its result. Both begin at a line of the caches: vectors
// that lie in two of them cost the values a tenth more.
static inline int64_t decode_floats(int64_t rows, int64_t D) {
  return rows * (round_up(D, 2 * vf::W) + 2 * DECODE_TILE + vf::W);
}

// The queries of a row of the batch and a KV head, query by query and head by head, over a span of
// its keys, whose beginning is `fetched`, or not. follow() is called once, towards the end, and
// returns the span whose beginning is fetched then.
template <class T, class F>
static void decode(const AttentionArgs& a, const Row& row, int64_t b, int64_t head,
                        const Span<T>& span, bool fetched, F&& follow, float* memory,
                        const Partial& result) {
  using Key = KeyRun<T>;
  using Value = ValueRun<T>;
  constexpr int W = vf::W;
  const int64_t G = a.H / a.K, D = a.D, rows = row.queries * G;
  const int64_t q_stride = round_up(D, 2 * W);
  float* q = memory;
  float* s = q + rows * q_stride;
  float* weights = s + rows * DECODE_TILE;
  float* total = weights + rows * DECODE_TILE;  // W lanes of each query

  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(a.q.data) + b * a.q.stride.b +
                    (row.first + r / G) * a.q.stride.t + (head * G + r % G) * a.q.stride.h;
    for_each_run<Key::size>(D, [&](int64_t e, auto width) {
      vf x[Key::V];
      Key::load(from + e * Key::size, x, width);
      for (int v = 0; v < Key::V; ++v) store(q + r * q_stride + (e * Key::V + v) * W, x[v]);
    });
    result.m[r] = -std::numeric_limits<float>::infinity();
    store(total + r * W, zero());
    for (int64_t d = 0; d < result.stride; d += W) store(result.sums_of + r * result.stride + d, zero());
  }

  // Calls f(r, number) for groups of queries; the keys of a tile that the last of them sees.
  auto for_each_group = [&](auto&& f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>{});
    if (rows - r == 3) f(r, std::integral_constant<int, 3>{});
    if (rows - r == 2) f(r, std::integral_constant<int, 2>{});
    if (rows - r == 1) f(r, std::integral_constant<int, 1>{});
  };
  auto seen = [&](int64_t r, int64_t tile) {
    return std::min({span.end, tile + DECODE_TILE, row.visible(a, row.first + r / G)}) - tile;
  };

  // A tile of each stream is fetched during SECTIONS tiles of arithmetic. All of a tile must be there
  // when its turn comes: later for each section, and for values, than for the first keys.
  constexpr int TURN = DECODE_TILE / SECTIONS;  // rows of a stream that are fetched meanwhile
  const int64_t early = std::max<int64_t>(TURN / 2, FETCH_BYTES / (D * int64_t(sizeof(T))));
  auto distance = [&](int n) { return DECODE_TILE + early - n / 2 * TURN - n % 2 * TURN * 3 / 2; };
  Span<T> next;
  bool followed = false;
  auto stream = [&](int n, int64_t j) {
    j += distance(n);
    if (j < span.section) return span.stream(n, j);
    if (!followed) next = follow();
    followed = true;
    return next.stream(n, j - span.section);
  };
  // While the scores of tile i are computed, and in `half` 1 the values of the tile before are added;
  // for the first group of queries, since the others read the same.
  auto ahead_of = [&](int64_t r, int64_t i, int half) {
    Ahead<T> ahead{};
    for (int n = 0; n < STREAMS && r == 0; ++n)
      ahead.of[n] = stream(n, i * TURN + half * TURN / 2);
    return ahead;
  };

  auto score = [&](int64_t i) {
    const int64_t tile = span.tile(i);
    for_each_group([&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      const Tile<T> k = span.keys(tile, seen(r + R - 1, tile));
      if (k.count > 0)
        score_tile<T, R>(q + r * q_stride, q_stride, k, D, s + r * DECODE_TILE, ahead_of(r, i, 0));
    });
  };
  auto weigh = [&](int64_t i) {
    const int64_t tile = span.tile(i);
    for (int64_t r = 0; r < rows; ++r)
      weigh_tile<T>(s + r * DECODE_TILE, seen(r, tile), a.scale, result.m[r], total + r * W,
                    result.sums_of + r * result.stride, result.stride, weights + r * DECODE_TILE);
  };
  auto add = [&](int64_t i) {
    const int64_t tile = span.tile(i);
    for_each_group([&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      constexpr int SUMS = std::min(8, (W == 16 ? 16 : 8) / R);  // of a query, in registers
      const Tile<T> v = span.values(tile, seen(r + R - 1, tile));
      if (v.count > 0)
        add_tile<T, R, std::max(1, SUMS / Value::V)>(weights + r * DECODE_TILE, v, D,
                                                     result.sums_of + r * result.stride,
                                                     result.stride, ahead_of(r, i + 1, 1));
    });
  };

  if (!fetched) {
    for (int n = 0; n < STREAMS; ++n)
      for (int64_t j = 0; j < distance(n); j += DECODE_TILE) {
        const Tile<T> rows = span.stream(n, j);
        for (int64_t i = 0; i < std::min(rows.count, distance(n) - j); ++i)
          Ahead<T>{rows}.fetch(i * STREAMS, 0, D);
      }
  }
  for (int j = 0; j < DECODE_TILE; ++j) ahead_of(0, 0, 1).fetch(j, 0, D);
  score(0);
  weigh(0);
  for (int64_t i = 0; i < span.tiles; ++i) {
    const bool more = i + 1 < span.tiles;
    if (more) score(i + 1);
    add(i);
    if (more) weigh(i + 1);
  }
  if (!followed) follow();

  for (int64_t r = 0; r < rows; ++r) {
    for_each_run<Value::size>(D, [&](int64_t e, auto) {
      float* at = result.sums_of + r * result.stride + e * Value::size;
      vf x[Value::V];
      for (int v = 0; v < Value::V; ++v) x[v] = load(at + v * W);
      Value::restore(x);
      for (int v = 0; v < Value::V; ++v) store(at + v * W, x[v]);
    });
    result.l[r] = sum(load(total + r * W));
  }
}

// Merges the partials of a row's splits into the first of them.
static inline void merge_states(float* partials, int64_t count, int64_t rows, int64_t D,
                                const ScoreScale& scale) {
  const Partial first(partials, rows, D);
  for (int64_t r = 0; r < rows; ++r) {
    float m = first.m[r];
    for (int64_t i = 1; i < count; ++i)
      m = std::max(m, Partial(partials + i * Partial::floats(rows, D), rows, D).m[r]);
    const float base = base_of(m);
    float l = 0.f;
    for (int64_t i = 0; i < count; ++i) {
      const Partial split(partials + i * Partial::floats(rows, D), rows, D);
      if (split.l[r] == 0.f) continue;  // all its keys lie behind this query
      const float weight = correction_of(split.m[r], scale, base);
      const vf factor = set(weight);
      l += split.l[r] * weight;
      float* to = first.sums_of + r * first.stride;
      const float* from = split.sums_of + r * split.stride;
      for (int64_t d = 0; d < D; d += vf::W)
        store(to + d, i == 0 ? load(from + d) * factor : fma(load(from + d), factor, load(to + d)));
    }
    first.m[r] = m;
    first.l[r] = l;
  }
}

// Ends one of `count` splits of a row and a KV head, whose partials begin at `first`: the last of them
// merges all and writes the result. `done` counts them, for each KV head of the row.
template <class T>
static void end_split(const AttentionArgs& a, const Row& row, int64_t b, int64_t head, float* first,
                      int64_t count, int32_t* done) {
  const int64_t G = a.H / a.K, rows = row.queries * G;
  if (count > 1) {
    // Whoever finishes last sees the others' partials.
    if (__atomic_add_fetch(&done[head], 1, __ATOMIC_ACQ_REL) < count) return;
    merge_states(first, count, rows, a.D, a.scale);
  }
  const Partial result(first, rows, a.D);
  for (int64_t r = 0; r < rows; ++r) {
    write_result<T>(a, b, row.first + r / G, head * G + r % G, result.sums_of + r * result.stride,
                    result.m[r], result.l[r]);
  }
}

}  // namespace ISA
}  // namespace llama_fast
