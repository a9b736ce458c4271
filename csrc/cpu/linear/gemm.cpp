// GEMM: a product of many rows with many lanes: out[r][l] = Σ_k row_r[k] · lane_l[k], limited by the
// multiply-adds. For `linear` the rows are W's and the lanes x's, since W then needs no transpose.
//
// Both sides become units of 4 bytes (floats, or pairs of bf16 where the CPU multiplies those). The
// lanes are packed first, into panels as wide as the registers of the inner loop, of which a chunk
// of K lies in L1. A task then takes a block of rows, packs it chunk after chunk into L2 and
// multiplies it by every panel: a tile of ROWS rows by WIDTH lanes stays in registers, one unit of a
// row meeting the whole width of a panel, while the next panel comes from the shared cache, and the
// rows' next chunk from memory.
//
// Order of a sum, the same for any number of rows, lanes and threads: unit by unit along a chunk,
// then chunk after chunk.
#include <algorithm>
#include <cstring>

#include "../../args.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"
#include "gemm_few.h"
#include "gemm_tiles.h"
#include "pack.h"

namespace llama_fast {
namespace ISA {

constexpr int ROWS = BROADCAST_ROWS;
constexpr int VECTORS = vf::W == 1 ? 4 : 2;
constexpr int WIDTH = VECTORS * vf::W;
constexpr int64_t BLOCK_TILES = 16;     // of rows in a task, at most: 192 KB, or 96
constexpr int64_t LANES = 512;          // packed at a time: the sums of a task stay in L2,
constexpr int64_t DEPTH_UNITS = 4096;   // of K: with the lanes 8 MB, for a shared cache
constexpr int64_t DEEP_ROWS = 8192;     // at a time, where K is more than this: 16 MB of sums

// c[r] (+)= rows[r] · panel, for ROWS rows and N vectors of lanes.
template <class T, int N>
static void multiply_tile(const float* rows, const float* panel, int64_t units, float* c,
                          bool first, LinesAhead& panel_ahead, LinesAhead& rows_ahead) {
  constexpr int64_t STEP = Side<T>::STEP_UNITS;  // of which `units` has a whole number
  vf total[ROWS][N];
#pragma GCC unroll 16
  for (auto& row : total)
    for (vf& t : row) t = zero();
  for (int64_t step = 0; step < units; step += STEP) {
    panel_ahead.step();
    rows_ahead.step();
    for (int64_t u = step; u < step + STEP; ++u) {
      vf x[N];
      for (int i = 0; i < N; ++i) x[i] = load(panel + (u * N + i) * vf::W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vf w = keep(set(rows[r * CHUNK_UNITS + u]));
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
                           int64_t units, float* c, bool first, LinesAhead& rows_ahead) {
  if constexpr (N > 1) {
    if (vectors < N)
      return multiply_panel<T, N - 1>(vectors, rows, tiles, panel, units, c, first, rows_ahead);
  }
  // The panel behind this one is the next.
  const int64_t floats = units * N * vf::W;
  LinesAhead panel_ahead{panel + floats, 1, floats * int64_t(sizeof(float)) / 64, 0,
                         tiles * units / Side<T>::STEP_UNITS};
  for (int64_t t = 0; t < tiles; ++t)
    multiply_tile<T, N>(rows + t * ROWS * CHUNK_UNITS, panel, units, c + t * ROWS * N * vf::W,
                        first, panel_ahead, rows_ahead);
}

// Up to LANES lanes, and the rows that meet them; K is walked in depths of DEPTH_UNITS.
template <class T> struct Product {
  static constexpr int W = vf::W;
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
    blocks = ceil_div(ceil_div(tiles(), BLOCK_TILES), threads) * threads;
    parts = std::min(ceil_div(2 * threads, std::min(blocks, tiles())), panels.count());
  }

  int64_t tiles() const { return ceil_div(R, ROWS); }
  int64_t first_tile(int64_t block) const { return tiles() * block / blocks; }
  int64_t rows_of(int64_t t0, int64_t t1) const { return std::min(t1 * ROWS, R) - t0 * ROWS; }
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
      const int64_t most_rows = ceil_div(tiles(), blocks) * ROWS;
      const int64_t most_sums = kept ? 0 : most_rows * ceil_div(panels.count(), parts) * WIDTH;
      float* rows = scratch<Work>(most_rows * CHUNK_UNITS + most_sums);
      float* own = rows + most_rows * CHUNK_UNITS;
      for (int64_t task = next(); task < blocks * parts; task = next()) {
        const int64_t block = task / parts, part = task % parts;
        const int64_t t0 = first_tile(block), t1 = first_tile(block + 1);
        const int64_t p0 = panels.count() * part / parts, p1 = panels.count() * (part + 1) / parts;
        if (t0 < t1)
          multiply_block(k0, k1, t0, t1, p0, p1, (task + threads) / parts, rows,
                         kept ? kept + (t0 * panels.count() + p0 * (t1 - t0)) * ROWS * WIDTH : own);
      }
    });
  }

  // `then` is the block that most likely comes next on this thread.
  void multiply_block(int64_t k0, int64_t k1, int64_t t0, int64_t t1, int64_t p0, int64_t p1,
                      int64_t then, float* rows, float* sums_of) const {
    const Side<T> side{a.rows, a.K};
    const int64_t first = r0 + t0 * ROWS, count = rows_of(t0, t1);
    const int64_t panel_sums = (t1 - t0) * ROWS * WIDTH;
    for (int64_t k = k0; k < k1; k += CHUNK) {
      const int64_t end = std::min(k + CHUNK, k1);
      const int64_t steps = (p1 - p0) * (t1 - t0) * ceil_div(end - k, Dot<T>::STEP);
      LinesAhead ahead;
      if (end < k1) {
        ahead = side.ahead(first, count, end, std::min(end + CHUNK, k1), steps);
      } else if (then < blocks) {
        const int64_t t = first_tile(then);
        ahead = side.ahead(r0 + t * ROWS, rows_of(t, first_tile(then + 1)), k0,
                           std::min(k0 + CHUNK, k1), steps);
      }
      for (int64_t r = 0; r < count; r += W)
        side.pack_rows(first + r, int(std::min<int64_t>(W, count - r)), k, end,
                       rows + r * CHUNK_UNITS, {CHUNK_UNITS, STEP_UNITS});
      for (int64_t p = p0; p < p1; ++p)
        multiply_panel<T>(panels.vectors_of(p), rows, t1 - t0, panel_at(p, k0, k, k1),
                          units(end - k), sums_of + (p - p0) * panel_sums, k == 0, ahead);
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
  if (a.R == 0 || a.L == 0) return;
#ifdef ISA_HAS_TILES
  if (a.dtype == DType::bf16) return gemm_by_tiles(a);
#endif
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (FewLanes<T>::takes(a)) FewLanes<T>(a).run();
    else multiply_matrices<T>(a);
  });
}

}  // namespace ISA
}  // namespace llama_fast
