// Decode against keys and values in 8 bits: decode.h in integers.
//
// Queries, and the weights of a tile of keys, become 16-bit words with a step of their own, whose
// products with the quantised values are summed exactly: an element of k or v then takes a quarter of the
// instructions that its conversion to float would. Their scales stay outside of the sums: the
// keys' multiply the scores, the values' multiply the weights before these become words. A word is
// within 2^-16 of the largest of these products, less than what the half types round by; a float takes
// two words.
#pragma once

#include <algorithm>
#include <cstring>

#include "../simd/words.h"
#include "decode.h"

namespace llama_fast {
namespace ISA {

constexpr int QUANTIZED_TILE = 64;  // keys; k and v of a tile fit L1 up to D = 256

template <class T> constexpr int WORDS = std::is_same_v<T, float> ? 2 : 1;  // of a number

// The nearest integer that is a word, of NaN too.
static inline vf whole_word(vf x) {
  return round(min(max(x, set(-WORD_MAX)), set(WORD_MAX)));
}

// x[0 … n) as NUMBER rows of words, `stride` apart; x is the sum of the rows, each times its step.
// Whole vectors of x and of the rows are read and written. A step is NaN where x is not finite.
template <int NUMBER>
static void to_words(const float* x, int64_t n, int16_t* words, int64_t stride, float* steps) {
  constexpr int W = vf::W;
  vf largest = zero(), bad = zero();
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i);
    largest = max(largest, max(v, zero() - v));
    bad = bad + (v - v);
  }
  const float top = max_of(largest);
  const vf factor = set(top > 1e-30f ? WORD_MAX / top : 0.f);  // none that is infinite
  steps[0] = top / WORD_MAX + sum(bad);
  if constexpr (NUMBER == 2) steps[1] = steps[0] / (2 * WORD_MAX);
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i) * factor, high = whole_word(v);
    store_words(words + i, high);
    if constexpr (NUMBER == 2)
      store_words(words + stride + i, whole_word((v - high) * set(2 * WORD_MAX)));
  }
}

// s[r, j] = q[r] · k[j] for R rows of words and the keys of a tile, while `ahead` is fetched. A
// block of keys is chosen so that its sums fill a vector.
template <int R>
static void score_words(const int16_t* q, int64_t q_stride, Tile<int8_t> k, int64_t D, float* s,
                        Tile<int8_t> ahead) {
  constexpr int W = vf::W;
  constexpr int KEYS = W == 1 ? 1 : R == 1 ? 8 : R == 2 ? W / 2 : W / 4;
  constexpr int GROUPS = (KEYS * R + W - 1) / W;
  for (int64_t j = 0; j < k.count; j += KEYS) {
    vi total[GROUPS][W];
    for (auto& group : total)
      for (vi& t : group) t = set(0);
    const int8_t* row[KEYS];  // behind the last key, the last one again
    for (int i = 0; i < KEYS; ++i) row[i] = k.row(std::min(j + i, k.count - 1));
    for_each_run<2 * W>(D, [&](int64_t e, auto width) {
      vi x[KEYS];
      for (int i = 0; i < KEYS; ++i) x[i] = load_words(row[i] + e * 2 * W, width);
      for (int r = 0; r < R; ++r) {
        const vi y = load_lanes(q + r * q_stride + e * 2 * W);
        for (int i = 0; i < KEYS; ++i) {
          vi& t = total[(r * KEYS + i) / W][(r * KEYS + i) % W];
          t = dot_words(x[i], y, t);
        }
      }
      if (e * 2 * W % 64 == 0)
        for (int i = 0; i < KEYS && j + i < ahead.count; ++i)
          __builtin_prefetch(ahead.row(j + i) + e * 2 * W, 0, 2);
    });
    for (int g = 0; g < GROUPS; ++g) {
      float lanes[W];
      store(lanes, sums(total[g]));
      for (int n = g * W; n < std::min((g + 1) * W, R * KEYS); ++n)
        s[n / KEYS * QUANTIZED_TILE + j + n % KEYS] = lanes[n - g * W];
    }
  }
}

// The scales of a tile's keys or values, zeros behind the last of them.
struct TileScales {
  float kept[QUANTIZED_TILE];
  const float* of;
  int64_t count;
  float bad;  // 0, or NaN where one is not finite

  TileScales(const HeadScales& x, int64_t b, int64_t head, int64_t tile, int64_t keys)
      : TileScales(x.data + b * x.stride.b + head * x.stride.h + tile * x.stride.t, x.stride.t, keys) {
    find_bad();
  }
  // The first keys of `all`, as far as it has them.
  TileScales(const TileScales& all, int64_t keys)
      : TileScales(all.of, 1, std::min(keys, all.count)) {
    if (count < all.count)
      find_bad();
    else
      of = all.of, bad = all.bad;
  }

 private:
  TileScales(const float* from, int64_t stride, int64_t keys) : of(from), count(keys), bad(0.f) {
    if (stride == 1 && count == QUANTIZED_TILE) return;
    for (int64_t j = 0; j < QUANTIZED_TILE; ++j) kept[j] = j < count ? from[j * stride] : 0.f;
    of = kept;
  }
  void find_bad() {
    vf differences = zero();
    for (int64_t j = 0; j < QUANTIZED_TILE; j += vf::W)
      differences = differences + (load(of + j) - load(of + j));
    bad = sum(differences);
  }
};

// Softmax over a part of the keys of a tile, count[i] of them, for R queries: sums of products s
// become weights, times the values' scales, as words. These are parts of the largest product of a
// weight and a scale: a key that a row attends to may have a scale far below the others'. `m` is the
// largest score of a query so far, and its W lanes of `l` add up to the sum of the weights without
// those scales. What was summed under an older m has to be multiplied by the correction. Each step is
// taken for all queries before the next, so that none waits for the one before.
template <int R, int NUMBER>
static void weigh(float* s, const float* q_steps, const TileScales& k, const TileScales& v,
                  const int64_t (&count)[R], const ScoreScale& scale, float* m, float* l,
                  int16_t* words, float* steps, float* correction) {
  constexpr int W = vf::W, LANES = (R + W - 1) / W * W;
  float tile_m[R], smaller[LANES] = {};
  for (int i = 0; i < R; ++i) {
    float* scores = s + i * NUMBER * QUANTIZED_TILE;
    const vf q_step = set(q_steps[i * NUMBER] * scale.unit);
    for (int64_t j = 0; j < count[i]; j += W) {
      vf x = load(scores + j);
      if constexpr (NUMBER == 2)
        x = fma(load(scores + QUANTIZED_TILE + j), set(0.5f / WORD_MAX), x);
      store(scores + j, x * (load(k.of + j) * q_step));
    }
    for (int64_t j = std::max<int64_t>(count[i], 0); j < QUANTIZED_TILE; ++j)
      scores[j] = -std::numeric_limits<float>::infinity();
    vf largest = load(scores);
    for (int64_t j = W; j < QUANTIZED_TILE; j += W) largest = max(largest, load(scores + j));
    tile_m[i] = count[i] > 0 ? max_of(largest) : m[i];
    smaller[i] = (std::min(m[i], tile_m[i]) - base_of(std::max(m[i], tile_m[i]))) * scale.rest;
  }
  for (int i = 0; i < LANES; i += W) store(smaller + i, exp2(load(smaller + i)));
  for (int i = 0; i < R; ++i) {
    float* scores = s + i * NUMBER * QUANTIZED_TILE;
    int16_t* to = words + i * NUMBER * QUANTIZED_TILE;
    if (count[i] <= 0) {
      std::memset(to, 0, NUMBER * QUANTIZED_TILE * sizeof(int16_t));
      for (int n = 0; n < NUMBER; ++n) steps[i * NUMBER + n] = 0.f;
      correction[i] = 1.f;
      continue;
    }
    correction[i] = tile_m[i] > m[i] ? smaller[i] : 1.f;
    m[i] = std::max(m[i], tile_m[i]);
    const vf base = set(base_of(m[i]));
    // The scale of a key that a query does not see must not reach it.
    const TileScales own(v, count[i]);
    vf sum_of = zero(), largest = zero();
    for (int64_t j = 0; j < QUANTIZED_TILE; j += W) {
      const vf p = exp2((load(scores + j) - base) * set(scale.rest));
      sum_of = sum_of + p;
      const vf product = p * load(own.of + j);
      largest = max(largest, product);
      store(scores + j, product);
    }
    store(l + i * W, fma(load(l + i * W), set(correction[i]), sum_of));
    const float bound = max_of(largest) + own.bad;
    const vf to_word = set(bound > 1e-33f ? WORD_MAX / bound : 0.f);  // none that is infinite
    steps[i * NUMBER] = bound / WORD_MAX;
    if constexpr (NUMBER == 2) steps[i * NUMBER + 1] = steps[i * NUMBER] / (2 * WORD_MAX);
    for (int64_t j = 0; j < QUANTIZED_TILE; j += W) {
      const vf x = load(scores + j) * to_word, high = whole_word(x);
      store_words(to + j, high);
      if constexpr (NUMBER == 2)
        store_words(to + QUANTIZED_TILE + j, whole_word((x - high) * set(2 * WORD_MAX)));
    }
  }
}

// o[r / NUMBER] += steps[r] · weights[r] · v for R rows of words and C runs of v from element d on;
// what o held is multiplied by its correction first.
template <int R, int NUMBER, int C, class Width>
static void add_word_runs(const int16_t* weights, const float* steps, Tile<int8_t> v, int64_t d,
                          Width width, float* o, int64_t o_stride, const float* correction,
                          Tile<int8_t> ahead) {
  constexpr int W = vf::W, RUN = 2 * W;
  vi total[R][2 * C];
  for (auto& row : total)
    for (vi& t : row) t = set(0);
  for (int64_t j = 0; j < v.count; j += 2) {
    // An odd last row is paired with itself, under a weight of zero.
    const int8_t *row0 = v.row(j) + d, *row1 = v.row(std::min(j + 1, v.count - 1)) + d;
    vi x[C][2];
    for (int c = 0; c < C; ++c) {
      load_columns(row0 + c * RUN, row1 + c * RUN, x[c][0], x[c][1], width);
      if (c * RUN % 64 == 0 && j < ahead.count) {
        __builtin_prefetch(ahead.row(j) + d + c * RUN, 0, 2);
        __builtin_prefetch(ahead.row(j + 1) + d + c * RUN, 0, 2);
      }
    }
    for (int r = 0; r < R; ++r) {
      const vi w = set_words(weights + r * QUANTIZED_TILE + j);
      for (int i = 0; i < 2 * C; ++i) total[r][i] = dot_words(x[i / 2][i % 2], w, total[r][i]);
    }
  }
  // Without the pragmas GCC 12 takes the sums out of the registers for these loops.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf factor = set(r % NUMBER ? 1.f : correction[r / NUMBER]), step = set(steps[r]);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * C; ++i) {
      float* at = o + r / NUMBER * o_stride + i * W;
      store(at, fma(to_float(total[r][i]), step, load(at) * factor));
    }
  }
}

template <int R, int NUMBER, int C>
static void add_words(const int16_t* weights, const float* steps, Tile<int8_t> v, int64_t d,
                      int64_t D, float* o, int64_t o_stride, const float* correction,
                      Tile<int8_t> ahead) {
  constexpr int RUN = 2 * vf::W;
  for (; d + C * RUN <= D; d += C * RUN)
    add_word_runs<R, NUMBER, C>(weights, steps, v, d, Full{}, o + d, o_stride, correction, ahead);
  if constexpr (C > 1) {
    if (d < D)
      add_words<R, NUMBER, C / 2>(weights, steps, v, d, D, o, o_stride, correction, ahead);
  } else if (d < D) {
    add_word_runs<R, NUMBER, 1>(weights, steps, v, d, int(D - d), o + d, o_stride, correction,
                                ahead);
  }
}

// The working memory of decode_quantized, besides its result.
static inline int64_t decode_quantized_floats(int64_t rows, int64_t D) {
  const int64_t words = 2 * rows * round_up(D, 2 * vf::W);
  return words / 2 + 16 + round_up(D, 2 * vf::W) + (2 + vf::W) * rows;
}

// The queries of a row of the batch and a KV head, query by query and head by head, over the keys
// [begin, end).
template <class T>
static void decode_quantized(const AttentionArgs& a, const Row& row, int64_t b,
                                  int64_t head, int64_t begin, int64_t end, float* memory,
                                  const Partial& result) {
  constexpr int W = vf::W, NUMBER = WORDS<T>;
  const int64_t G = a.H / a.K, D = a.D, rows = row.queries * G, q_stride = round_up(D, 2 * W);
  float* wide = memory;
  float* total = wide + q_stride;  // W lanes of each query
  float* q_steps = total + rows * W;
  int16_t* q = reinterpret_cast<int16_t*>(q_steps + round_up(2 * rows, 16));

  for (int64_t d = 0; d < q_stride; d += W) store(wide + d, zero());
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(a.q.data) + b * a.q.stride.b +
                    (row.first + r / G) * a.q.stride.t + (head * G + r % G) * a.q.stride.h;
    for_each_vector(D, [&](int64_t d, auto width) { store(wide + d, load(from + d, width)); });
    to_words<NUMBER>(wide, q_stride, q + r * NUMBER * q_stride, q_stride, q_steps + r * NUMBER);
    result.m[r] = -std::numeric_limits<float>::infinity();
    store(total + r * W, zero());
    for (int64_t d = 0; d < result.stride; d += W) store(result.sums_of + r * result.stride + d, zero());
  }

  const auto of_head = [&](const Heads& x) {
    return x.at<const int8_t>(b, 0) + head * x.stride.h;
  };
  const int8_t *keys = of_head(a.k), *values = of_head(a.v);
  const int64_t k_stride = a.k.stride.t, v_stride = a.v.stride.t;
  for (int64_t tile = begin; tile < end; tile += QUANTIZED_TILE) {
    const int64_t count = std::min<int64_t>(QUANTIZED_TILE, end - tile);
    const int64_t after = std::min<int64_t>(QUANTIZED_TILE, end - tile - count);
    const Tile<int8_t> none{nullptr, 0, 0};
    const Tile<int8_t> k{keys + tile * k_stride, k_stride, count};
    const Tile<int8_t> v{values + tile * v_stride, v_stride, count};
    const Tile<int8_t> next{k.row(count), k_stride, after};
    const TileScales k_scales(a.k_scales, b, head, tile, count), v_scales(a.v_scales, b, head, tile, count);

    auto some = [&](int64_t r, auto number) {
      constexpr int R = decltype(number)::value;
      // The last of these queries sees the most.
      const int64_t seen = std::min(count, row.visible(a, row.first + (r + R - 1) / G) - tile);
      if (seen <= 0) return;
      float s[R * NUMBER * QUANTIZED_TILE];
      int16_t weights[R * NUMBER * QUANTIZED_TILE];
      float steps[R * NUMBER], correction[R];
      score_words<R * NUMBER>(q + r * NUMBER * q_stride, q_stride, {k.data, k.stride, seen}, D, s,
                              r == 0 ? v : none);
      int64_t own[R];
      for (int i = 0; i < R; ++i)
        own[i] = std::min(count, row.visible(a, row.first + (r + i) / G) - tile);
      weigh<R, NUMBER>(s, q_steps + r * NUMBER, k_scales, v_scales, own, a.scale, result.m + r,
                       total + r * W, weights, steps, correction);
      constexpr int VECTORS = vf::W == 16 ? 16 : 8;  // sums that leave registers for the rest
      constexpr int C = std::min(4, std::max(1, VECTORS / (R * NUMBER * 2)));
      add_words<R * NUMBER, NUMBER, C>(weights, steps, {v.data, v.stride, seen}, 0, D,
                                       result.sums_of + r * result.stride, result.stride,
                                       correction, r == 0 ? next : none);
    };
    constexpr int AT_ONCE = 4 / NUMBER;
    int64_t r = 0;
    for (; r + AT_ONCE <= rows; r += AT_ONCE) some(r, std::integral_constant<int, AT_ONCE>{});
    if constexpr (AT_ONCE == 4) {
      if (rows - r == 3) some(r, std::integral_constant<int, 3>{});
      if (rows - r == 2) some(r, std::integral_constant<int, 2>{});
    }
    if (rows - r == 1) some(r, std::integral_constant<int, 1>{});
  }

  for (int64_t r = 0; r < rows; ++r) {
    result.l[r] = sum(load(total + r * W));
    for (int64_t d = 0; d < D; d += 2 * W) {
      float* at = result.sums_of + r * result.stride + d;
      vf first, second;
      order_columns(load(at), load(at + W), first, second);
      store(at, first);
      store(at + W, second);
    }
  }
}

}  // namespace ISA
}  // namespace llama_fast
