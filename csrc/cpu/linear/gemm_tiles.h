// The product of bf16 by tile registers (AMX), for any number of rows and lanes: 32 rows meet 32 lanes.
//
// The lanes are packed into panels, pairs of elements side by side, as the right side of a tile wants
// them. Rows are its left side, and need no packing: where there are few lanes, which is limited by
// reading the rows, they are multiplied as they lie in memory. Otherwise a task takes a block of rows,
// of which it packs a chunk of K at a time, so that a tile of them and its share of a panel lie in L1
// together, and keeps the sums in L2.
//
// Order of a sum: that of the instruction, step after step (see simd/amx.h). So it depends neither
// on the number of rows and lanes nor on which of the two ways it is taken.
#pragma once

#include "../simd/amx.h"

#ifdef ISA_HAS_TILES

#include <algorithm>

#include "../parallel.h"
#include "../scratch.h"
#include "pack.h"

namespace llama_fast {
namespace ISA {
namespace tiles {

using Lines = Side<bf16>;                  // a step of a row is a line of memory: 32 elements
constexpr int ROWS = 2 * TILE_WORDS, WIDTH = 2 * TILE_WORDS;
constexpr int64_t STEP = 32, STEP_UNITS = TILE_WORDS;
constexpr int64_t TILE_UNITS = ROWS * STEP_UNITS;  // of a step of packed rows
constexpr int64_t CHUNK = 8 * STEP;        // of K: 16 KB of a tile of rows, as much of a panel
constexpr int64_t BLOCK_TILES = 8;         // of rows in a task, at most: 128 KB of a chunk
constexpr int64_t LANES = 512;             // packed at a time: the sums of a task stay in L2
constexpr int64_t DIRECT_PANELS = 4;       // up to which rows are multiplied as they lie

// Where a tile of rows lies, in bytes: from a row to the next, and from a step to the next.
struct TileRows {
  const char* first;
  int64_t row, step;
};

// c (+)= rows · panel over `steps` steps, for N vectors of lanes.
template <int N, class Meanwhile>
static inline void multiply(const TileRows& rows, const float* panel, int64_t steps, float* c,
                            bool first, Meanwhile&& meanwhile) {
  constexpr int64_t panel_row = N * TILE_BYTES;
  const char *low = rows.first, *high = low + TILE_WORDS * rows.row;
  const char* lanes = reinterpret_cast<const char*>(panel);
  float* c_high = c + TILE_WORDS * N * TILE_WORDS;
  written(c);
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, panel_row);
    _tile_loadd(2, c_high, panel_row);
    if (N == 2) _tile_loadd(1, c + TILE_WORDS, panel_row);
    if (N == 2) _tile_loadd(3, c_high + TILE_WORDS, panel_row);
  }
  for (int64_t s = 0; s < steps; ++s) {
    meanwhile();
    _tile_loadd(6, lanes, panel_row);
    _tile_loadd(4, low, rows.row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, high, rows.row);
    _tile_dpbf16ps(2, 5, 6);
    if (N == 2) {
      _tile_loadd(7, lanes + TILE_BYTES, panel_row);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    lanes += TILE_WORDS * panel_row;
    low += rows.step;
    high += rows.step;
  }
  _tile_stored(0, c, panel_row);
  _tile_stored(2, c_high, panel_row);
  if (N == 2) _tile_stored(1, c + TILE_WORDS, panel_row);
  if (N == 2) _tile_stored(3, c_high + TILE_WORDS, panel_row);
  written(c);
}
template <class Meanwhile>
static inline void multiply(int vectors, const TileRows& rows, const float* panel, int64_t steps,
                            float* c, bool first, Meanwhile&& meanwhile) {
  if (vectors == 1) multiply<1>(rows, panel, steps, c, first, meanwhile);
  else multiply<2>(rows, panel, steps, c, first, meanwhile);
}

// Up to LANES lanes from l0 on, and all rows.
class Product {
 public:
  Product(const GemmArgs& args, int64_t l)
      : a_(args), rows_{args.rows, args.K}, l0_(l),
        vectors_(ceil_div(std::min(LANES, args.L - l), TILE_WORDS)), panels_(ceil_div(vectors_, 2)),
        tiles_(ceil_div(args.R, ROWS)), steps_(ceil_div(args.K, STEP)),
        direct_(!args.rows.transposed && panels_ <= DIRECT_PANELS), threads_(max_threads()) {
    struct Packed;
    packed_ = scratch<Packed>(vectors_ * TILE_WORDS * steps_ * STEP_UNITS);
  }

  void run() {
    pack_lanes();
    // Blocks of even sizes; where they are too few for the threads, panels are split too.
    const int64_t blocks = ceil_div(ceil_div(tiles_, BLOCK_TILES), threads_) * threads_;
    const int64_t parts = std::min(ceil_div(2 * threads_, std::min(blocks, tiles_)), panels_);
    parallel_tasks(blocks * parts, threads_, [&](auto next) {
      const TileRegisters registers;
      for (int64_t task = next(); task < blocks * parts; task = next()) {
        const int64_t block = task / parts, part = task % parts;
        const int64_t t0 = tiles_ * block / blocks, t1 = tiles_ * (block + 1) / blocks;
        const int64_t p0 = panels_ * part / parts, p1 = panels_ * (part + 1) / parts;
        if (direct_) multiply_rows(t0, t1, p0, p1);
        else if (t0 < t1) multiply_block(t0, t1, p0, p1);
      }
    });
  }

 private:
  int vectors_of(int64_t panel) const { return int(std::min<int64_t>(2, vectors_ - 2 * panel)); }
  int64_t rows_of(int64_t t0, int64_t t1) const { return std::min(t1 * ROWS, a_.R) - t0 * ROWS; }
  // A panel's share of K from step k on.
  float* panel_at(int64_t panel, int64_t k) const {
    const int64_t lanes = vectors_of(panel) * TILE_WORDS;
    return packed_ + (panel * WIDTH * steps_ + k * lanes) * STEP_UNITS;
  }

  void pack_lanes() const {
    const Lines side{a_.lanes, a_.K};
    parallel_for(vectors_, 1 + 8192 / (a_.K * TILE_WORDS), [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        const int64_t l = l0_ + v * TILE_WORDS;
        side.pack_lanes(l, int(std::min<int64_t>(TILE_WORDS, a_.L - l)), 0, a_.K,
                        panel_at(v / 2, 0) + v % 2 * TILE_WORDS, vectors_of(v / 2) * TILE_WORDS);
      }
    });
  }

  // Rows [first, first + n) from element k_begin to k_end, as one tile or several.
  void pack_rows(int64_t first, int64_t n, int64_t k_begin, int64_t k_end, float* to) const {
    const int64_t tile = ceil_div(k_end - k_begin, STEP) * TILE_UNITS;
    for (int64_t r = 0; r < n; r += TILE_WORDS)
      rows_.pack_rows(first + r, int(std::min<int64_t>(TILE_WORDS, n - r)), k_begin, k_end,
                      to + r / ROWS * tile + r % ROWS * STEP_UNITS, {STEP_UNITS, TILE_UNITS});
  }

  int64_t row_bytes() const { return a_.rows.rows.stride2 * int64_t(sizeof(bf16)); }

  // Few lanes. The CPU foresees the lines of 32 rows by itself: to fetch them costs a quarter.
  void multiply_rows(int64_t t0, int64_t t1, int64_t p0, int64_t p1) const {
    struct Work;
    float* last = scratch<Work>(TILE_UNITS * steps_ + ROWS * WIDTH);
    float* c = last + TILE_UNITS * steps_;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t first = t * ROWS, n = rows_of(t, t + 1);
      // A tile that rows do not fill, and what a row has behind its last step, are packed.
      const int64_t direct = n == ROWS ? a_.K / STEP : 0;
      if (direct < steps_) pack_rows(first, n, direct * STEP, a_.K, last);
      const TileRows lying{reinterpret_cast<const char*>(rows_.vector(first)), row_bytes(), TILE_BYTES};
      for (int64_t p = p0; p < p1; ++p) {
        const int vectors = vectors_of(p);
        if (direct) multiply(vectors, lying, panel_at(p, 0), direct, c, true, [] {});
        if (direct < steps_)
          multiply(vectors, packed(last), panel_at(p, direct), steps_ - direct, c, !direct, [] {});
        write(c, first, n, p);
      }
    }
  }
  static TileRows packed(const float* rows) {
    return {reinterpret_cast<const char*>(rows), TILE_BYTES, ROWS * TILE_BYTES};
  }

  // Many.
  void multiply_block(int64_t t0, int64_t t1, int64_t p0, int64_t p1) const {
    struct Work;
    const int64_t tiles = t1 - t0, first = t0 * ROWS, n = rows_of(t0, t1);
    const int64_t chunk_units = tiles * TILE_UNITS * (CHUNK / STEP), sums = tiles * ROWS * WIDTH;
    float* rows = scratch<Work>(chunk_units + (p1 - p0) * sums);
    float* c = rows + chunk_units;
    for (int64_t k = 0; k < a_.K; k += CHUNK) {
      const int64_t end = std::min(k + CHUNK, a_.K), steps = ceil_div(end - k, STEP);
      pack_rows(first, n, k, end, rows);
      const int64_t all_steps = (p1 - p0) * tiles * steps;
      LinesAhead rows_ahead = rows_.ahead(first, n, end, std::min(end + CHUNK, a_.K), all_steps);
      for (int64_t p = p0; p < p1; ++p) {
        const int vectors = vectors_of(p);
        const float* panel = panel_at(p, k / STEP);
        LinesAhead panel_ahead;
        if (p + 1 < p1) {
          const int64_t lines = steps * TILE_WORDS * vectors_of(p + 1);
          panel_ahead = {panel_at(p + 1, k / STEP), 1, lines, 0, tiles * steps};
        }
        for (int64_t t = 0; t < tiles; ++t) {
          float* its = c + (p - p0) * sums + t * ROWS * vectors * TILE_WORDS;
          multiply(vectors, packed(rows + t * steps * TILE_UNITS), panel, steps, its, k == 0, [&] {
            panel_ahead.step();
            rows_ahead.step();
          });
        }
      }
    }
    for (int64_t p = p0; p < p1; ++p) write(c + (p - p0) * sums, first, n, p);
  }

  void write(const float* c, int64_t first, int64_t n, int64_t p) const {
    const int64_t l = l0_ + p * WIDTH, width = vectors_of(p) * TILE_WORDS;
    const int64_t stride = a_.out_transposed ? a_.R : a_.L;
    bf16* out = static_cast<bf16*>(a_.out);
    write_panel(c, n, width, std::min(width, a_.L - l),
                out + (a_.out_transposed ? l * stride + first : first * stride + l), stride,
                a_.out_transposed);
  }

  const GemmArgs& a_;
  Lines rows_;
  int64_t l0_, vectors_, panels_, tiles_, steps_;
  bool direct_;
  int64_t threads_;
  float* packed_;
};

}  // namespace tiles

static void gemm_by_tiles(const GemmArgs& a) {
  for (int64_t l = 0; l < a.L; l += tiles::LANES) tiles::Product(a, l).run();
}

}  // namespace ISA
}  // namespace llama_fast

#endif
