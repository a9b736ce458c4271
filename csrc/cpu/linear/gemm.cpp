// GEMM: a product of many rows with many lanes: out[r][l] = Σ_k row_r[k] · lane_l[k], limited by the
// multiply-adds. For `linear` the rows are W's and the lanes x's, since W then needs no transpose.
//
// Both sides become units of 4 bytes (floats, or pairs of bf16 where the CPU multiplies those). The
// lanes are packed first, into panels as wide as the registers of the inner loop, of which a chunk
// of K lies in L1. A task then takes a block of rows, packs it chunk after chunk into L2 and
// multiplies it by every panel: a tile of ROWS rows by WIDTH lanes stays in registers, one unit of a
// row meeting the whole width of a panel, while the next panel comes from the shared cache.
//
// Order of a sum, the same for any number of rows, lanes and threads: unit by unit along a chunk,
// then chunk after chunk.
#include <algorithm>
#include <cstring>

#include "../../args.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/amx.h"
#include "../simd/dot.h"

namespace llama_fast {
namespace ISA {

// Whether the tile registers multiply this type.
#ifdef ISA_HAS_TILES
template <class T> constexpr bool BY_TILES = std::is_same_v<T, bf16>;
#else
template <class T> constexpr bool BY_TILES = false;
#endif
template <class T>
constexpr int ROWS = BY_TILES<T> ? 32 : vf::W == 16 ? 12 : vf::W == 8 ? 6 : 4;
constexpr int VECTORS = vf::W == 1 ? 4 : 2;
constexpr int WIDTH = VECTORS * vf::W;
template <class T>                      // of K: a panel's share is 32 KB, or 16 by tiles or on AVX2
constexpr int64_t CHUNK_UNITS = BY_TILES<T> ? 128 : 256;
template <class T>                      // of rows in a task, at most: 192 KB; 128 by tiles, 96 on AVX2
constexpr int64_t BLOCK_TILES = 8;
constexpr int64_t LANES = 512;          // packed at a time: the sums of a task stay in L2,
constexpr int64_t DEPTH_UNITS = 4096;   // of K: with the lanes 8 MB, for a shared cache
constexpr int64_t DEEP_ROWS = 8192;     // at a time, where K is more than this: 16 MB of sums

static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Lines of memory to fetch into L2 while something else is computed, evenly: many requests at once
// make what follows wait. `run` lines lie side by side, the next ones `stride` bytes behind them.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, int64_t lines, int64_t steps) : Ahead(first, 1, lines, 0, steps) {}
  Ahead(const void* first, int64_t runs, int64_t run, int64_t stride, int64_t steps)
      : line(static_cast<const char*>(first)), count(runs * run), run(run), left(run),
        jump(stride - (run - 1) * 64), each(ceil_div(count, steps)) {}
  void step() {
    for (int64_t i = std::min(each, count); i > 0; --i) {
      __builtin_prefetch(line, 0, 2);
      --count;
      if (--left) {
        line += 64;
      } else {
        line += jump;
        left = run;
      }
    }
  }

 private:
  const char* line = nullptr;
  int64_t count = 0, run = 0, left = 0, jump = 0, each = 0;
};

#ifdef ISA_HAS_TILES
// The same by tile registers: two of rows, N of lanes.
template <int N>
static void multiply_tile_registers(const float* rows, const float* panel, int64_t units, float* c,
                                    bool first, Ahead& next, Ahead& rows_next) {
  constexpr int64_t panel_bytes = N * TILE_BYTES;
  const float* high = rows + TILE * TILE;
  const char* lanes = reinterpret_cast<const char*>(panel);
  float* c_high = c + TILE * N * TILE;
  written(rows);
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, panel_bytes);
    _tile_loadd(2, c_high, panel_bytes);
    if (N == 2) _tile_loadd(1, c + TILE, panel_bytes);
    if (N == 2) _tile_loadd(3, c_high + TILE, panel_bytes);
  }
  for (int64_t u = 0; u < units; u += TILE) {
    next.step();
    rows_next.step();
    _tile_loadd(6, lanes + u * panel_bytes, panel_bytes);
    _tile_loadd(4, rows + u * 2 * TILE, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, high + u * 2 * TILE, TILE_BYTES);
    _tile_dpbf16ps(2, 5, 6);
    if (N == 2) {
      _tile_loadd(7, lanes + u * panel_bytes + TILE_BYTES, panel_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, panel_bytes);
  _tile_stored(2, c_high, panel_bytes);
  if (N == 2) _tile_stored(1, c + TILE, panel_bytes);
  if (N == 2) _tile_stored(3, c_high + TILE, panel_bytes);
}
#endif

// Steps of the inner loop.
template <class T> static int64_t steps_of(int64_t units) {
  return units / (Dot<T>::PARTS * vf::W);
}

// c[r] (+)= rows[r] · panel, for ROWS rows and N vectors of lanes.
template <class T, int N>
static void multiply_tile(const float* rows, const float* panel, int64_t units, float* c,
                          bool first, Ahead& next, Ahead& rows_next) {
#ifdef ISA_HAS_TILES
  if constexpr (BY_TILES<T>) return multiply_tile_registers<N>(rows, panel, units, c, first, next, rows_next);
#endif
  constexpr int ROWS = ISA::ROWS<T>;
  constexpr int64_t STEP = Dot<T>::PARTS * vf::W;  // of which `units` has a whole number
  vf total[ROWS][N];
#pragma GCC unroll 16
  for (auto& row : total)
    for (vf& t : row) t = zero();
  for (int64_t step = 0; step < units; step += STEP) {
    next.step();
    rows_next.step();
    for (int64_t u = step; u < step + STEP; ++u) {
      vf x[N];
      for (int i = 0; i < N; ++i) x[i] = load(panel + (u * N + i) * vf::W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vf w = keep(set(rows[r * CHUNK_UNITS<T> + u]));
        for (int i = 0; i < N; ++i) total[r][i] = Dot<T>::add(w, x[i], total[r][i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    for (int i = 0; i < N; ++i) {
      float* at = c + (r * N + i) * vf::W;
      store(at, first ? total[r][i] : load(at) + total[r][i]);
    }
  }
}

// A side of the product: `count` vectors of K elements each, of which this packs.
template <class T> struct Side {
  using D = Dot<T>;
  static constexpr int STEP_UNITS = D::PARTS * vf::W;  // units of STEP elements
  // Of packed rows, in units: rows of a chunk lie one after the other; or a tile has those of each
  // step together, as its registers take them.
  static constexpr int64_t ROW_STRIDE = BY_TILES<T> ? STEP_UNITS : CHUNK_UNITS<T>;
  static constexpr int64_t STEP_STRIDE = BY_TILES<T> ? ROWS<T> * STEP_UNITS : STEP_UNITS;
  static int64_t row_at(int64_t r) {
    return BY_TILES<T> ? r / ROWS<T> * ROWS<T> * CHUNK_UNITS<T> + r % ROWS<T> * STEP_UNITS
                       : r * CHUNK_UNITS<T>;
  }
  const MatrixSide& m;
  int64_t K;

  const T* vector(int64_t i) const { return static_cast<const T*>(m.data) + m.rows.offset(i); }

  // The STEP elements of a vector from k on, in a buffer with zeros where they end.
  const T* step(const T* vector, int64_t k, T (&buffer)[D::STEP]) const {
    if (k + D::STEP <= K) return vector + k;
    std::memset(buffer, 0, sizeof(buffer));
    std::memcpy(buffer, vector + k, size_t(K - k) * sizeof(T));
    return buffer;
  }

  // Elements k_begin to k_end of n vectors from `first` on, in so many steps; columns are not fetched.
  Ahead ahead(int64_t first, int64_t n, int64_t k_begin, int64_t k_end, int64_t steps) const {
    if (m.transposed || k_begin >= k_end) return {};
    return {vector(first) + k_begin, n, ceil_div((k_end - k_begin) * int64_t(sizeof(T)), 64),
            m.rows.stride2 * int64_t(sizeof(T)), steps};
  }

  // Where a vector runs down the memory: unit `unit` of the step at k, of `n` vectors from `first`.
  vf unit(int64_t k, int unit, int64_t first, int n) const {
    const int64_t at_k = k + D::element(unit);
    auto load_at = [&](int64_t i) {
      const T* p = static_cast<const T*>(m.data) + i * m.rows.stride2 + first;
      return i >= K ? zero() : n == vf::W ? load(p) : load(p, n);
    };
    if constexpr (D::UNIT == 1) return load_at(at_k);
#ifdef ISA_HAS_PAIRS
    else return pair_up(load_at(at_k), load_at(at_k + 1));
#endif
  }

  // n ≤ W vectors from `first` on, elements k_begin to k_end → units, as row_at has them.
  void pack_rows(int64_t first, int n, int64_t k_begin, int64_t k_end, float* to) const {
    if (!m.transposed) {
      for (int i = 0; i < n; ++i) {
        const T* from = vector(first + i);
        T last[D::STEP];
        float* row = to + i * ROW_STRIDE;
        for (int64_t k = k_begin; k < k_end; k += D::STEP, row += STEP_STRIDE)
          D::pack(step(from, k, last), reinterpret_cast<typename D::Packed*>(row));
      }
      return;
    }
    for (int64_t k = k_begin; k < k_end; k += D::STEP, to += STEP_STRIDE) {
      for (int part = 0; part < D::PARTS; ++part) {
        vf x[vf::W];
        for (int i = 0; i < vf::W; ++i) x[i] = unit(k, part * vf::W + i, first, n);
        transpose(x);
        for (int i = 0; i < n; ++i) store(to + i * ROW_STRIDE + part * vf::W, x[i]);
      }
    }
  }

  // n ≤ W vectors from `first` on, elements k_begin to k_end → W lanes of each unit, `width` apart.
  // Lanes beyond n hold anything: what comes of them goes nowhere.
  void pack_lanes(int64_t first, int n, int64_t k_begin, int64_t k_end, float* to,
                  int64_t width) const {
    const T* from[vf::W] = {};
    T last[vf::W][D::STEP];
    for (int i = 0; i < vf::W && !m.transposed; ++i) from[i] = vector(first + std::min(i, n - 1));
    auto put = [&](vf (&x)[vf::W]) {
      if (!m.transposed) transpose(x);
      for (int i = 0; i < vf::W; ++i, to += width) store(to, x[i]);
    };
    for (int64_t k = k_begin; k < k_end; k += D::STEP) {
      vf x[D::PARTS][vf::W];
      for (int i = 0; i < vf::W; ++i) {
        if (m.transposed) {
          for (int part = 0; part < D::PARTS; ++part)
            x[part][i] = unit(k, part * vf::W + i, first, n);
        } else {
          const T* elements = step(from[i], k, last[i]);
          x[0][i] = D::template weights<0>(elements);
          if constexpr (D::PARTS == 2) x[1][i] = D::template weights<1>(elements);
        }
      }
      for (auto& part : x) put(part);
    }
  }
};

// Panels of lanes, the last one as narrow as it may be.
struct Panels {
  int64_t lanes;
  int64_t vectors() const { return ceil_div(lanes, vf::W); }
  int64_t count() const { return ceil_div(vectors(), VECTORS); }
  int vectors_of(int64_t panel) const {
    return int(std::min<int64_t>(VECTORS, vectors() - panel * VECTORS));
  }
};

template <class T, int N = VECTORS>
static void multiply_panel(int vectors, const float* rows, int64_t tiles, const float* panel,
                           int64_t units, float* c, bool first, Ahead& rows_next) {
  if constexpr (N > 1) {
    if (vectors < N)
      return multiply_panel<T, N - 1>(vectors, rows, tiles, panel, units, c, first, rows_next);
  }
  // The panel behind this one is the next.
  Ahead next(panel + units * N * vf::W, units * N * vf::W / 16, tiles * steps_of<T>(units));
  for (int64_t t = 0; t < tiles; ++t)
    multiply_tile<T, N>(rows + t * ROWS<T> * CHUNK_UNITS<T>, panel, units,
                        c + t * ROWS<T> * N * vf::W, first, next, rows_next);
}

// Sums (rows, width) → out[r][l], or out[l][r].
template <class T>
static void write_panel(const float* c, int64_t rows, int64_t width, int64_t lanes, T* out,
                        int64_t stride, bool transposed) {
  constexpr int W = vf::W;
  if (!transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      for_each_vector(lanes, [&](int64_t l, auto n) {
        store(out + r * stride + l, load(c + r * width + l), n);
      });
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += W) {
    const int n = int(std::min<int64_t>(W, rows - r));
    for (int64_t l = 0; l < lanes; l += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = i < n ? load(c + (r + i) * width + l) : zero();
      transpose(x);
      for (int i = 0; i < W && l + i < lanes; ++i) {
        T* at = out + (l + i) * stride + r;
        if (n == W) store(at, x[i]);
        else store(at, x[i], n);
      }
    }
  }
}

// Up to LANES lanes, and the rows that meet them; K is walked in depths of DEPTH_UNITS.
template <class T> struct Product {
  static constexpr int W = vf::W, ROWS = ISA::ROWS<T>, CHUNK_UNITS = ISA::CHUNK_UNITS<T>;
  static constexpr int64_t STEP_UNITS = Side<T>::STEP_UNITS;
  static constexpr int64_t CHUNK = CHUNK_UNITS / STEP_UNITS * Dot<T>::STEP;  // elements
  static constexpr int64_t DEPTH = DEPTH_UNITS / STEP_UNITS * Dot<T>::STEP;
  const GemmArgs& a;
  int64_t l0, r0, R, threads;
  Panels panels;
  float* packed;       // the lanes of a depth, by chunk, then panel, then unit
  float* kept;         // the sums from depth to depth, or null: there is one depth
  int64_t blocks, parts;  // of rows, of panels: the tasks

  Product(const GemmArgs& args, int64_t l, int64_t r, int64_t rows)
      : a(args), l0(l), r0(r), R(std::min(rows, a.R - r)), threads(max_threads()),
        panels{std::min(LANES, a.L - l)} {
    struct Packed;
    struct Kept;
    const int64_t padded = panels.count() * WIDTH, depth = std::min(a.K, DEPTH);
    packed = scratch<Packed>(padded * ceil_div(depth, CHUNK) * CHUNK_UNITS);
    kept = a.K > DEPTH ? scratch<Kept>(tiles() * ROWS * padded) : nullptr;
    // Blocks of even sizes; where they are too few for the threads, panels are split too.
    blocks = ceil_div(ceil_div(tiles(), BLOCK_TILES<T>), threads) * threads;
    parts = std::min(ceil_div(2 * threads, std::min(blocks, tiles())), panels.count());
  }

  int64_t tiles() const { return ceil_div(R, ROWS); }
  static int64_t units(int64_t elements) { return ceil_div(elements, Dot<T>::STEP) * STEP_UNITS; }

  // The panel's share of the chunk at k, of a depth that starts at k0 and ends at k1.
  float* panel_at(int64_t panel, int64_t k0, int64_t k, int64_t k1) const {
    const int64_t width = panels.vectors() * W;
    return packed + (k - k0) / CHUNK * CHUNK_UNITS * width +
           panel * WIDTH * units(std::min(CHUNK, k1 - k));
  }

  void pack(int64_t k0, int64_t k1) const {
    const Side<T> side{a.lanes, a.K};
    const int64_t vectors = panels.vectors(), chunks = ceil_div(k1 - k0, CHUNK);
    parallel_for(vectors * chunks, 1 + 8192 / (CHUNK * W), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t v = i % vectors, k = k0 + i / vectors * CHUNK, l = l0 + v * W;
        side.pack_lanes(l, int(std::min<int64_t>(W, a.L - l)), k, std::min(k + CHUNK, k1),
                        panel_at(v / VECTORS, k0, k, k1) + v % VECTORS * W,
                        panels.vectors_of(v / VECTORS) * W);
      }
    });
  }

  void multiply(int64_t k0, int64_t k1) const {
    parallel_tasks(blocks * parts, threads, [&](auto next) {
      struct Work;
#ifdef ISA_HAS_TILES
      const TileRegisters registers;
#endif
      const int64_t most_rows = ceil_div(tiles(), blocks) * ROWS;
      const int64_t most_sums = kept ? 0 : most_rows * ceil_div(panels.count(), parts) * WIDTH;
      float* rows = scratch<Work>(most_rows * CHUNK_UNITS + most_sums);
      float* own = rows + most_rows * CHUNK_UNITS;
      for (int64_t task = next(); task < blocks * parts; task = next()) {
        const int64_t block = task / parts, part = task % parts;
        const int64_t t0 = tiles() * block / blocks, t1 = tiles() * (block + 1) / blocks;
        const int64_t p0 = panels.count() * part / parts, p1 = panels.count() * (part + 1) / parts;
        if (t0 < t1)
          multiply_block(k0, k1, t0, t1, p0, p1, rows,
                         kept ? kept + (t0 * panels.count() + p0 * (t1 - t0)) * ROWS * WIDTH : own);
      }
    });
  }

  void multiply_block(int64_t k0, int64_t k1, int64_t t0, int64_t t1, int64_t p0, int64_t p1,
                      float* rows, float* sums_of) const {
    const Side<T> side{a.rows, a.K};
    const int64_t first = r0 + t0 * ROWS, count = std::min(t1 * ROWS, R) - t0 * ROWS;
    const int64_t panel_sums = (t1 - t0) * ROWS * WIDTH;
    for (int64_t k = k0; k < k1; k += CHUNK) {
      const int64_t end = std::min(k + CHUNK, k1);
      for (int64_t r = 0; r < count; r += W)
        side.pack_rows(first + r, int(std::min<int64_t>(W, count - r)), k, end,
                       rows + Side<T>::row_at(r));
      const int64_t steps = (p1 - p0) * (t1 - t0) * steps_of<T>(units(end - k));
      Ahead next = side.ahead(first, count, end, std::min(end + CHUNK, k1), steps);
      for (int64_t p = p0; p < p1; ++p)
        multiply_panel<T>(panels.vectors_of(p), rows, t1 - t0, panel_at(p, k0, k, k1),
                          units(end - k), sums_of + (p - p0) * panel_sums, k == 0, next);
    }
    if (k1 < a.K) return;
    T* out = static_cast<T*>(a.out);
    const int64_t stride = a.out_transposed ? a.R : a.L;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t l = l0 + p * WIDTH, width = panels.vectors_of(p) * W;
      write_panel(sums_of + (p - p0) * panel_sums, count, width, std::min(width, a.L - l),
                  out + (a.out_transposed ? l * stride + first : first * stride + l), stride,
                  a.out_transposed);
    }
  }
};

template <class T> static void multiply_matrices(const GemmArgs& a) {
  const int64_t rows = a.K > Product<T>::DEPTH ? DEEP_ROWS : a.R;
  for (int64_t l = 0; l < a.L; l += LANES) {
    for (int64_t r = 0; r < a.R; r += rows) {
      const Product<T> product(a, l, r, rows);
      for (int64_t k = 0; k < a.K; k += Product<T>::DEPTH) {
        const int64_t end = std::min(k + Product<T>::DEPTH, a.K);
        product.pack(k, end);
        product.multiply(k, end);
      }
    }
  }
}

void gemm(const GemmArgs& a) {
  if (a.dtype == DType::bf16) multiply_matrices<bf16>(a);
  else multiply_matrices<f16>(a);
}

}  // namespace ISA
}  // namespace llama_fast
