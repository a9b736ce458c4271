// Decoding: so few query heads share a KV head that reading k and v from memory is what takes time.
//
// Keys and values are used as they lie in memory, a tile at a time, for up to four query heads at
// once; tiles are fetched ahead. A row's keys are split into parts of a length that depends on that
// row alone, so that a long context keeps all threads busy, and neither the number of threads nor
// the other rows change a result. The last part to be done combines them.
#pragma once

#include "softmax.h"

namespace llama_fast {
namespace ISA {

constexpr int FEW_TILE = 64;  // keys; k and v of a tile fit L1 for D = 128 in 16 bits

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

// s[r, j] = q[r] · k[j] for R queries and the keys of a tile, while `ahead` is fetched. A block of
// keys is chosen so that its sums fill a vector.
template <class T, int R>
static void score_tile(const float* q, int64_t q_stride, Tile<T> k, int64_t D, float* s,
                       Tile<T> ahead) {
  using Key = KeyRun<T>;
  constexpr int W = vf::W, V = Key::V;
  constexpr int KEYS = W == 1 ? 1 : R == 1 ? 8 : R == 2 ? W / 2 : W / 4;
  constexpr int GROUPS = (KEYS * R + W - 1) / W;
  for (int64_t j = 0; j < k.count; j += KEYS) {
    vf total[GROUPS][W];
    for (auto& group : total)
      for (vf& t : group) t = zero();
    vf earlier[R][KEYS] = {};  // of a scalar build, which sums one by one: two levels keep it exact
    const T* row[KEYS];  // behind the last key, the last one again
    for (int i = 0; i < KEYS; ++i) row[i] = k.row(std::min(j + i, k.count - 1));
    for_each_run<Key::size>(D, [&](int64_t e, auto width) {
      vf x[KEYS][V];
      for (int i = 0; i < KEYS; ++i) Key::load(row[i] + e * Key::size, x[i], width);
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
          const vf y = load(q + r * q_stride + (e * V + v) * W);
          for (int i = 0; i < KEYS; ++i) {
            vf& t = total[(r * KEYS + i) / W][(r * KEYS + i) % W];
            t = Unit<T>::madd(x[i][v], y, t);
          }
        }
      }
      for (int i = 0; i < KEYS && j + i < ahead.count; ++i)
        __builtin_prefetch(ahead.row(j + i) + e * Key::size);
      if constexpr (W == 1) {
        if (e % 16 == 15) {
          for (int r = 0; r < R; ++r) {
            earlier[r][0] = earlier[r][0] + total[r][0];
            total[r][0] = zero();
          }
        }
      }
    });
    if constexpr (W == 1)
      for (int r = 0; r < R; ++r) total[r][0] = earlier[r][0] + total[r][0];
    float sums_of[GROUPS * W];
    for (int g = 0; g < GROUPS; ++g) store(sums_of + g * W, sums(total[g]));
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < KEYS; ++i) s[r * FEW_TILE + j + i] = sums_of[r * KEYS + i];
  }
}

// o[r] = correction[r] · o[r] + weights[r] · v, for R queries and C runs of v from element d on.
template <class T, int R, int C, class Width>
static void add_runs(const float* weights, Tile<T> v, int64_t d, Width width, float* o,
                     int64_t o_stride, const float* correction, Tile<T> ahead) {
  using Value = ValueRun<T>;
  constexpr int W = vf::W, V = Value::V, STEP = Unit<T>::size;
  vf total[R][C * V];
  for (auto& row : total)
    for (vf& t : row) t = zero();
  for (int64_t j = 0; j < v.count; j += STEP) {
    // An odd last row is paired with itself, under a weight of zero.
    const int64_t next = j + 1 < v.count ? v.stride : 0;
    vf x[C][V];
    for (int c = 0; c < C; ++c) {
      Value::load(v.row(j) + d + c * Value::size, next, x[c], width);
      if (j < ahead.count)
        for (int i = 0; i < STEP; ++i)
          __builtin_prefetch(ahead.row(j + i) + d + c * Value::size);
    }
    for (int r = 0; r < R; ++r) {
      const vf w = set(weights[r * FEW_TILE + j / STEP]);
      for (int i = 0; i < C * V; ++i) total[r][i] = Unit<T>::madd(w, x[i / V][i % V], total[r][i]);
    }
  }
  // Without the pragmas GCC 12 takes the sums out of the registers for these loops.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * V; ++i) {
      float* at = o + r * o_stride + i * W;
      store(at, fma(load(at), set(correction[r]), total[r][i]));
    }
  }
}

template <class T, int R>
static void add_tile(const float* weights, Tile<T> v, int64_t D, float* o, int64_t o_stride,
                     const float* correction, Tile<T> ahead) {
  using Value = ValueRun<T>;
  constexpr int VECTORS = vf::W == 16 ? 16 : 8;  // accumulators that leave registers for the rest
  constexpr int C = std::max(1, VECTORS / (R * Value::V));
  int64_t d = 0;
  for (; d + C * Value::size <= D; d += C * Value::size)
    add_runs<T, R, C>(weights, v, d, Full{}, o + d, o_stride, correction, ahead);
  for (; d + Value::size <= D; d += Value::size)
    add_runs<T, R, 1>(weights, v, d, Full{}, o + d, o_stride, correction, ahead);
  if (d < D) add_runs<T, R, 1>(weights, v, d, int(D - d), o + d, o_stride, correction, ahead);
}

// What is known of some queries after a part of the keys: sums (rows, stride), and of each query
// the largest exponent and the sum of the weights.
struct Partial {
  float *sums_of, *top, *total;
  int64_t stride;

  static int64_t stride_for(int64_t D) { return round_up(D, 2 * vf::W); }
  static int64_t floats(int64_t rows, int64_t D) { return rows * (stride_for(D) + 2); }
  Partial(float* memory, int64_t rows, int64_t D)
      : sums_of(memory),
        top(memory + rows * stride_for(D)),
        total(top + rows),
        stride(stride_for(D)) {}
};

// The working memory of few_queries, besides its result.
static inline int64_t few_floats(int64_t rows, int64_t D) {
  return rows * round_up(D, 2 * vf::W) + 4 * FEW_TILE;
}

// The queries of a row of the batch and a KV head, query by query and head by head, over the keys
// [begin, end).
template <class T>
static void few_queries(const AttentionArgs& a, const Row& row, int64_t b, int64_t head,
                        int64_t begin, int64_t end, float* memory, const Partial& result) {
  using Key = KeyRun<T>;
  using Value = ValueRun<T>;
  constexpr int W = vf::W;
  const int64_t G = a.H / a.K, D = a.D, rows = row.queries * G;
  const int64_t q_stride = round_up(D, 2 * W);
  float* q = memory;
  float* s = q + rows * q_stride;

  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(a.q) + b * a.q_stride.b +
                    (row.first + r / G) * a.q_stride.t + (head * G + r % G) * a.q_stride.h;
    for_each_run<Key::size>(D, [&](int64_t e, auto width) {
      vf x[Key::V];
      Key::load(from + e * Key::size, x, width);
      for (int v = 0; v < Key::V; ++v) store(q + r * q_stride + (e * Key::V + v) * W, x[v]);
    });
    result.top[r] = -std::numeric_limits<float>::infinity();
    result.total[r] = 0.f;
    for (int64_t d = 0; d < result.stride; d += W) store(result.sums_of + r * result.stride + d, zero());
  }

  const float factor = a.scale * 1.44269504f;  // weights are powers of two
  const T* keys = static_cast<const T*>(a.k) + b * a.k_stride.b + head * a.k_stride.h;
  const T* values = static_cast<const T*>(a.v) + b * a.v_stride.b + head * a.v_stride.h;
  for (int64_t tile = begin; tile < end; tile += FEW_TILE) {
    const int64_t count = std::min<int64_t>(FEW_TILE, end - tile);
    const int64_t after = std::min<int64_t>(FEW_TILE, end - tile - count);
    const Tile<T> none{nullptr, 0, 0};
    const Tile<T> k{keys + tile * a.k_stride.t, a.k_stride.t, count};
    const Tile<T> v{values + tile * a.v_stride.t, a.v_stride.t, count};
    const Tile<T> next{k.row(count), a.k_stride.t, after};

    auto some = [&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      // The last of these queries sees the most.
      const int64_t last = row.first + (r + R - 1) / G;
      const int64_t seen = std::min(count, row.visible(a, last) - tile);
      if (seen <= 0) return;
      score_tile<T, R>(q + r * q_stride, q_stride, {k.data, k.stride, seen}, D, s,
                       r == 0 ? v : none);
      float correction[R];
      for (int i = 0; i < R; ++i) {
        const int64_t visible = row.visible(a, row.first + (r + i) / G) - tile;
        correction[i] = softmax_part<T>(s + i * FEW_TILE, std::min(count, visible),
                                        round_up(seen, Unit<T>::size), factor, result.top[r + i],
                                        result.total[r + i]);
      }
      add_tile<T, R>(s, {v.data, v.stride, seen}, D, result.sums_of + r * result.stride,
                     result.stride, correction, r == 0 ? next : none);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) some(r, std::integral_constant<int, 4>{});
    if (rows - r == 3) some(r, std::integral_constant<int, 3>{});
    if (rows - r == 2) some(r, std::integral_constant<int, 2>{});
    if (rows - r == 1) some(r, std::integral_constant<int, 1>{});
  }

  for (int64_t r = 0; r < rows; ++r) {
    for_each_run<Value::size>(D, [&](int64_t e, auto) {
      float* at = result.sums_of + r * result.stride + e * Value::size;
      vf x[Value::V];
      for (int v = 0; v < Value::V; ++v) x[v] = load(at + v * W);
      Value::restore(x);
      for (int v = 0; v < Value::V; ++v) store(at + v * W, x[v]);
    });
  }
}

// Adds the parts up, into the first of them.
static inline void combine(float* parts, int64_t count, int64_t rows, int64_t D) {
  const Partial first(parts, rows, D);
  for (int64_t r = 0; r < rows; ++r) {
    float top = first.top[r];
    for (int64_t i = 1; i < count; ++i)
      top = std::max(top, Partial(parts + i * Partial::floats(rows, D), rows, D).top[r]);
    float total = 0.f;
    for (int64_t i = 0; i < count; ++i) {
      const Partial part(parts + i * Partial::floats(rows, D), rows, D);
      if (part.total[r] == 0.f) continue;  // all its keys lie behind this query
      const vf factor = set(exp2_of(part.top[r] - top));
      total += part.total[r] * exp2_of(part.top[r] - top);
      float* to = first.sums_of + r * first.stride;
      const float* from = part.sums_of + r * part.stride;
      for (int64_t d = 0; d < D; d += vf::W)
        store(to + d, i == 0 ? load(from + d) * factor : fma(load(from + d), factor, load(to + d)));
    }
    first.top[r] = top;
    first.total[r] = total;
  }
}

}  // namespace ISA
}  // namespace llama_fast
