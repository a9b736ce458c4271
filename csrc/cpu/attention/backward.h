// The gradients of a block of queries, tile of keys by tile of keys (Dao, "FlashAttention-2", 2023).
//
//     P = exp(score - lse)     dP = g vᵀ     dS = P ∘ (dP - delta)     delta = Σ_d o · g
//     dv += Pᵀ g               dk += scale · dSᵀ q                    dq += scale · dS k
//
// Five products, as many as there are to make: nothing is multiplied twice. A block owns its dq; the
// sums of dk and dv belong to all blocks that share a KV head, which add to a tile in turn (see
// backward.cpp). Rows are the G query heads of each token, token by token, so that the sums over a
// group are made in the registers.
//
// The left sides of the first two products and of dq's are rows of units, those of dk's and dv's run
// down them: units are of two rows there. What is multiplied from the right is packed in panels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "documents.h"
#include "tiles.h"

namespace llama_fast {
namespace ISA {
namespace bwd {

constexpr int MR = vf::W == 16 ? 12 : vf::W == 8 ? 6 : 4;  // rows of the inner loop,
constexpr int NV = vf::W == 1 ? 4 : 2;                     // and vectors of its panels
constexpr int PANEL = NV * vf::W;
constexpr int TILE = 96;   // keys
constexpr int STRIP = 24;  // rows whose scores stay in L1
static_assert(TILE % MR == 0 && TILE % PANEL == 0 && STRIP % MR == 0);

// Rows of a block at most, where a token has no more: its working memory stays in L2.
static inline int64_t block_rows(int64_t D) { return D <= 128 ? 192 : 96; }

// Working memory of a thread, laid out from `memory`, which may be null to learn the size.
template <class T> struct Memory {
  static constexpr int SIZE = Unit<T>::size;
  int64_t columns, padded, floats = 0;
  T* rows;                      // (padded, D): those of q, then of g, as they lie in memory
  float *q, *g;                 // (padded, columns): units of a row
  float *q_panels, *g_panels;   // units of SIZE rows, in panels of columns
  float *k_down, *v_down;       // a tile: units of a key, in panels of keys
  float* k_panels;              // a tile: units of SIZE keys, in panels of columns
  float *p, *ds;                // (padded / SIZE, TILE): units of SIZE rows
  float *scores, *dp, *ds_rows; // (STRIP, TILE): floats, floats and units of a row
  float* dq;                    // (padded, columns)
  float *lse_high, *lse_low, *delta;  // (padded)
  int32_t* visible;                   // (padded): the keys that a row sees, zero of rows that are none

  Memory(float* memory, int64_t rows_count, int64_t D)
      : columns(round_up(D, vf::W)), padded(round_up(rows_count, std::max(MR, SIZE))) {
    auto take = [&](int64_t count) {
      float* at = memory ? memory + floats : nullptr;
      floats += round_up(count, 16);
      return at;
    };
    rows = reinterpret_cast<T*>(take(padded * D));
    q = take(padded * columns);
    g = take(padded * columns);
    q_panels = take(padded * columns);
    g_panels = take(padded * columns);
    k_down = take(TILE * columns);
    v_down = take(TILE * columns);
    k_panels = take(TILE * columns);
    const int64_t down = round_up(padded, STRIP) / SIZE * TILE;
    p = take(down);
    ds = take(down);
    dq = take(padded * columns);
    lse_high = take(padded);
    lse_low = take(padded);
    delta = take(padded);
    visible = reinterpret_cast<int32_t*>(take(padded));
    scores = SIZE == 1 ? nullptr : take(STRIP * TILE);
    dp = SIZE == 1 ? nullptr : take(STRIP * TILE);
    ds_rows = SIZE == 1 ? nullptr : take(STRIP * TILE);
  }
};

// A block of queries of one sequence and one KV head.
struct Block {
  const AttentionBackwardArgs& a;  // of the whole call
  const AttentionArgs& of;         // of the sequence
  int64_t b;                       // its row in `of`
  int64_t begin;                   // its first token in the call
  Heads grad, o;                   // of the sequence, (B, T, H, D)
  const Row& row;
  int64_t head, t_begin, t_end;
  float *dk, *dv;  // the sums of the sequence's KV head, (keys, columns)

  int64_t heads() const { return of.H / of.K; }
  int64_t rows() const { return (t_end - t_begin) * heads(); }
  int64_t token(int64_t r) const { return t_begin + r / heads(); }
  int64_t query_head(int64_t r) const { return head * heads() + r % heads(); }
  // The first row that sees more than the first n keys.
  int64_t first_row(int64_t n) const {
    return of.causal ? std::max<int64_t>(0, n - row.ahead + 1 - t_begin) * heads() : 0;
  }
  // Where the keys end that the blocks before this one see: none is left to add to those behind.
  int64_t visible_before() const { return t_begin > row.first ? row.visible(of, t_begin - 1) : 0; }
  bool is_last() const { return t_end == of.T; }
};

// Rows r of `x` (B, T, H, D), one after another: in memory.rows, as units of a row and in panels.
template <class T>
static void pack_queries(const Block& block, const Heads& x, const Memory<T>& m, int64_t D, float* units_of,
                         float* panels) {
  const int64_t rows = block.rows();
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(m.rows + r * D, x.at<T>(block.b, block.token(r)) + block.query_head(r) * x.stride.h,
                size_t(D) * sizeof(T));
  std::memset(static_cast<void*>(m.rows + rows * D), 0, size_t((m.padded - rows) * D) * sizeof(T));
  for (int64_t r = 0; r < m.padded; ++r) put_units(m.rows + r * D, D, units_of + r * m.columns);
  pack_values<T, PANEL>(m.rows, D, m.padded, D, panels);
}

// c (+)= a · b for MR rows of a and up to N vectors of columns of b, of which `left` are left.
template <class T, bool DOWN, int N = NV>
static inline void add_panel(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c,
                             int64_t c_stride, int64_t left, bool fresh) {
  if constexpr (N > 1) {
    if (left < N * vf::W)
      return add_panel<T, DOWN, N - 1>(a, a_stride, b, steps, c, c_stride, left, fresh);
  }
  multiply<T, MR, N, DOWN>(a, a_stride, b, steps, [&](int r, int i, vf sums_of) {
    float* at = c + r * c_stride + i * vf::W;
    store(at, fresh ? sums_of : load(at) + sums_of);
  });
}

// The first n lanes of x, zeros behind them, whatever x has there.
static inline vf first_lanes(vf x, int64_t n) {
  if (n >= vf::W) return x;
  float lanes[vf::W];
  store(lanes, x);
  return n > 0 ? load(lanes, int(n)) : zero();
}

// What turns a row's scores and dP into weights and dS.
struct Weigh {
  vf unit, rest, minus_high, lse_low, delta;
  // No weight is above 1, though a large score, rounded in another order than in the forward pass, may
  // be above its lse.
  void operator()(vf score, vf dp, vf& p, vf& ds) const {
    p = exp2(min(zero(), (fma(score, unit, minus_high) - lse_low) * rest));
    ds = p * (dp - delta);
  }
};

// Weights and dS of the rows [strip, strip + count) for the tile's first `own` keys each, zeros behind
// them up to `fill`; in place, or where units are pairs, from `scores` and `dp`.
template <class T, class Own>
static void weigh_strip(const Memory<T>& m, const ScoreScale& scale, int64_t strip, int64_t count,
                        int64_t fill, Own&& own) {
  constexpr int W = vf::W, SIZE = Unit<T>::size;
  for (int64_t r = strip; r < strip + count; r += SIZE) {
    Weigh weigh[SIZE];
    int64_t seen[SIZE];
    for (int i = 0; i < SIZE; ++i) {
      weigh[i] = {set(scale.unit), set(scale.rest), set(-m.lse_high[r + i]), set(m.lse_low[r + i]),
                  set(m.delta[r + i])};
      seen[i] = own(r + i);
    }
    float* p = m.p + r / SIZE * TILE;
    float* ds = m.ds + r / SIZE * TILE;
    if constexpr (SIZE == 1) {
      int64_t n = 0;
      for (; n + W <= seen[0]; n += W) {
        vf x, dx;
        weigh[0](load(p + n), load(ds + n), x, dx);
        store(p + n, x);
        store(ds + n, dx);
      }
      for (; n < fill; n += W) {
        vf x, dx;
        weigh[0](load(p + n), load(ds + n), x, dx);
        store(p + n, first_lanes(x, seen[0] - n));
        store(ds + n, first_lanes(dx, seen[0] - n));
      }
    } else {
      const float* s = m.scores + (r - strip) * TILE;
      const float* dp = m.dp + (r - strip) * TILE;
      T* row = reinterpret_cast<T*>(m.ds_rows + (r - strip) * TILE);  // a row has half its TILE
      for (int64_t n = 0; n < fill; n += W) {
        vf x[SIZE], dx[SIZE];
        for (int i = 0; i < SIZE; ++i) {
          weigh[i](load(s + i * TILE + n), load(dp + i * TILE + n), x[i], dx[i]);
          x[i] = first_lanes(x[i], seen[i] - n);
          dx[i] = first_lanes(dx[i], seen[i] - n);
          store(row + i * 2 * TILE + n, dx[i]);
        }
        store_split(reinterpret_cast<T*>(p + n), x[0], x[1]);
        store_split(reinterpret_cast<T*>(ds + n), dx[0], dx[1]);
      }
    }
  }
}

// What the forward pass left of each row: lse in units of the scores, as a sum of two floats, and delta.
// That is summed as dP is, so that dS of a query with a single key, such as the first of a document, is
// 0 as it should be. The units of o lie in dq's memory meanwhile.
template <class T> static void read_rows(const Block& block, const Memory<T>& m) {
  constexpr int ROWS = 8;  // whose sums do not wait for each other
  const AttentionArgs& of = block.of;
  for (int64_t r = 0; r < m.padded; ++r) {
    m.lse_high[r] = m.lse_low[r] = 0.f;
    m.visible[r] = 0;
    if (r >= block.rows()) continue;
    const int64_t t = block.token(r), h = block.query_head(r);
    double lse = static_cast<const LseOf<T>*>(of.lse)[(block.b * of.H + h) * of.lse_stride + t];
    // Of scores that are all -infinity there is no softmax.
    if (lse == -std::numeric_limits<double>::infinity()) lse = std::nan("");
    lse /= of.scale.factor;
    m.lse_high[r] = float(lse);
    m.lse_low[r] = float(lse - m.lse_high[r]);
    m.visible[r] = int32_t(block.row.visible(of, t));
    put_units(block.o.at<T>(block.b, t) + h * block.o.stride.h, of.D, m.dq + r * m.columns);
  }
  for (int64_t r = 0; r < m.padded; r += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, block.rows() - r);
    vf delta[ROWS];
    for (vf& x : delta) x = zero();
    for (int64_t u = 0; rows > 0 && u < of.D / Unit<T>::size; ++u)
      for (int i = 0; i < ROWS; ++i) {
        const int64_t at = (r + std::min<int64_t>(i, rows - 1)) * m.columns + u;
        delta[i] = Unit<T>::madd(set(m.g[at]), set(m.dq[at]), delta[i]);
      }
    for (int i = 0; i < ROWS && r + i < m.padded; ++i) {
      float lanes[vf::W];
      store(lanes, delta[i]);
      m.delta[r + i] = lanes[0];
    }
  }
}

// The sums of `count` keys from `first` on, times `factor`, to a result (B, S, K, D).
template <class T>
static void write_keys(const Block& block, const float* sums_of, int64_t columns, int64_t first,
                       int64_t count, float factor, void* result) {
  const AttentionArgs& whole = block.a.forward;
  for (int64_t n = first; n < first + count; ++n) {
    const int64_t s = block.b * whole.S + block.begin + n;
    T* to = static_cast<T*>(result) + (s * whole.K + block.head) * whole.D;
    for_each_vector(whole.D, [&](int64_t d, auto width) {
      store(to + d, load(sums_of + n * columns + d, width) * set(factor), width);
    });
  }
}

// All of a block. my_turn(i) returns when the block may add to tile i of dk and dv, and passed(i) says
// that it has.
template <class T, class Turn, class Passed>
static void add_block(const Block& block, float* memory, Turn&& my_turn, Passed&& passed) {
  constexpr int SIZE = Unit<T>::size;
  const AttentionArgs& of = block.of;
  const int64_t D = of.D, units = D / SIZE, rows = block.rows();
  const Memory<T> m(memory, rows, D);
  const int64_t columns = m.columns, steps_of_rows = round_up(rows, SIZE) / SIZE;
  float* scores = SIZE == 1 ? nullptr : m.scores;
  const float scale = of.scale.unit * of.scale.factor;

  pack_queries<T>(block, of.q, m, D, m.q, m.q_panels);
  pack_queries<T>(block, block.grad, m, D, m.g, m.g_panels);
  read_rows<T>(block, m);
  std::fill(m.dq, m.dq + m.padded * columns, 0.f);

  const T* keys = of.k.template at<T>(block.b, 0) + block.head * of.k.stride.h;
  const T* values = of.v.template at<T>(block.b, 0) + block.head * of.v.stride.h;
  const int64_t end = m.visible[rows - 1], before = block.visible_before();
  for (int64_t tile = 0; tile < end; tile += TILE) {
    const int64_t count = std::min<int64_t>(TILE, end - tile);
    const int64_t tile_steps = (count + SIZE - 1) / SIZE;
    const int64_t fill = round_up(round_up(count, MR), vf::W);
    pack_keys<T, PANEL>(keys + tile * of.k.stride.t, of.k.stride.t, count, D, m.k_down);
    pack_keys<T, PANEL>(values + tile * of.v.stride.t, of.v.stride.t, count, D, m.v_down);
    pack_values<T, PANEL>(keys + tile * of.k.stride.t, of.k.stride.t, count, D, m.k_panels);

    auto own = [&](int64_t r) { return std::clamp<int64_t>(m.visible[r] - tile, 0, count); };
    auto seen = [&](int64_t r) { return own(std::min(r + MR, rows) - 1); };  // of MR rows, the last
    for (int64_t strip = 0; strip < m.padded; strip += STRIP) {
      const int64_t strip_end = std::min<int64_t>(strip + STRIP, m.padded);
      if (m.visible[std::min(strip_end, rows) - 1] <= tile) continue;
      // Where units are single floats, weights replace the scores in their place.
      float* s = scores ? scores : m.p + strip * TILE;
      float* dp = scores ? m.dp : m.ds + strip * TILE;
      auto score = [&](const float* left, const float* right, float* to) {
        for (int64_t j = 0; j < count; j += PANEL) {
          for (int64_t r = strip; r < strip_end; r += MR) {
            if (seen(r) > j)
              add_panel<T, false>(left + r * columns, columns, right + j * units, units,
                                  to + (r - strip) * TILE + j, TILE, PANEL, true);
          }
        }
      };
      score(m.q, m.k_down, s);
      score(m.g, m.v_down, dp);
      weigh_strip<T>(m, of.scale, strip, strip_end - strip, fill, own);
      const float* ds = scores ? m.ds_rows : m.ds + strip * TILE;
      for (int64_t d = 0; d < columns; d += PANEL) {
        for (int64_t r = strip; r < strip_end; r += MR) {
          if (seen(r) > 0)
            add_panel<T, false>(ds + (r - strip) * TILE, TILE, m.k_panels + d * tile_steps,
                                (seen(r) + SIZE - 1) / SIZE, m.dq + r * columns + d, columns,
                                columns - d, false);
        }
      }
    }

    my_turn(tile / TILE);
    auto add_down = [&](const float* left, const float* panels, float* sums_of) {
      for (int64_t d = 0; d < columns; d += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, columns - d);
        for (int64_t n = 0; n < count; n += MR) {
          const int64_t step = block.first_row(tile + n) / SIZE;
          add_panel<T, true>(left + step * TILE + n, TILE,
                             panels + d * (m.padded / SIZE) + step * width, steps_of_rows - step,
                             sums_of + (tile + n) * columns + d, columns, columns - d,
                             block.is_last());
        }
      }
    };
    add_down(m.p, m.g_panels, block.dv);
    add_down(m.ds, m.q_panels, block.dk);
    if (tile >= before) {  // with the keys of the tile that only other blocks see
      const int64_t all = std::min<int64_t>(TILE, block.row.keys - tile);
      write_keys<T>(block, block.dk, columns, tile, all, scale, block.a.dk);
      write_keys<T>(block, block.dv, columns, tile, all, 1.f, block.a.dv);
    }
    passed(tile / TILE);
  }

  const AttentionArgs& whole = block.a.forward;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = block.b * whole.T + block.begin + block.token(r);
    T* to = static_cast<T*>(block.a.dq) + (t * whole.H + block.query_head(r)) * D;
    for_each_vector(D, [&](int64_t d, auto width) {
      store(to + d, load(m.dq + r * columns + d, width) * set(scale), width);
    });
  }
}

}  // namespace bwd
}  // namespace ISA
}  // namespace llama_fast
