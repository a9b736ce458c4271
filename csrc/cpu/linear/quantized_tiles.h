// The product of quantised weights by tile registers (AMX): 16 rows of x meet a block of W.
//
// A group of 16 rows of x is a left side. That group of a block is a right side as it lies, once its
// values are signed bytes. Their product is the group's sums, exact, in integers, and these are scaled
// and added as they are elsewhere, group after group: neither the number of rows nor the instruction set
// changes a bit.
//
// A task takes blocks through all rows, a chunk of columns at a time: two blocks' chunks, in bytes, stay
// in L1 with that of a tile of rows, and the rows' chunk in L2.
#pragma once

#include "../simd/amx.h"

#ifdef ISA_HAS_TILES

#include "ahead.h"
#include "quantized.h"

namespace llama_fast {
namespace ISA {
namespace tiles {

constexpr int64_t COLUMNS = 512;                  // of a chunk: a multiple of every group size
constexpr int64_t CHUNK_BYTES = COLUMNS * BLOCK;  // of a block
constexpr int64_t COLUMNS_OF_TILE = 64;           // at most
// Blocks whose chunks are in L1 together, and that meet the rows' chunk while it is in L2.
constexpr int64_t NEAR_BLOCKS = 2, TASK_BLOCKS = 16;
// Products whose sums wait in memory until they are used: they take some time to arrive there.
constexpr int64_t WAITING = 3, RING = WAITING + 1;
constexpr int64_t SUMS_BYTES = TILE_WORDS * TILE_BYTES;  // of a product
constexpr int SCALES_AHEAD = 512;                  // bytes from what is used to what is fetched

// A chunk of a block, and of a tile of rows of x.
struct BlockChunk {
  const uint8_t* w;
  bool is_signed;
  const f16 *scales, *minima;  // minima may be null
  int64_t groups, group_size;
  Activations x;
  bool first;    // of the columns: the totals start here
  float* total;  // (MT, BLOCK)
  char* ring;    // RING products' sums
};

template <int MT> static void add_chunk(const BlockChunk& c, LinesAhead& ahead) {
  // The compiler would read all of these anew after each store of a tile.
  const int64_t groups = c.groups, group_size = c.group_size;
  const f16 *scales = c.scales, *minima = c.minima;
  const float *x_scales = c.x.scales, *x_sums = c.x.sums;
  const int8_t* x = c.x.bytes;
  const uint8_t* w = c.w;
  const bool is_signed = c.is_signed;
  char* const ring = c.ring;
  LinesAhead fetched = ahead;

  vf total[MT];
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m) total[m] = c.first ? zero() : load(c.total + m * BLOCK);
  for (int64_t begun = 0; begun < groups + WAITING; ++begun) {
    if (begun < groups) {
      _tile_zero(0);
      for (int64_t k = 0; k < group_size; k += COLUMNS_OF_TILE) {
        _tile_loadd(4, x + k, group_size);
        _tile_loadd(6, w + k * BLOCK, LINE);
        if (is_signed) _tile_dpbssd(0, 4, 6);
        else _tile_dpbsud(0, 4, 6);
      }
      x += MT * group_size;
      w += BLOCK * group_size;
    }
    if (begun >= WAITING) {
      fetched.step();
      __builtin_prefetch(reinterpret_cast<const char*>(scales) + SCALES_AHEAD);
      const char* sums = ring + (begun - WAITING) % RING * SUMS_BYTES;
      const vf scale = load(scales);
#pragma GCC unroll 16
      for (int m = 0; m < MT; ++m)
        total[m] = fma(to_float(load_lanes(sums + m * LINE)), scale * set(x_scales[m]), total[m]);
      scales += BLOCK;
      x_scales += MT;
      if (minima) {
        __builtin_prefetch(reinterpret_cast<const char*>(minima) + SCALES_AHEAD);
        const vf minimum = load(minima);
#pragma GCC unroll 16
        for (int m = 0; m < MT; ++m) total[m] = fma(minimum, set(x_sums[m]), total[m]);
        minima += BLOCK;
        x_sums += MT;
      }
    }
    if (begun < groups) {
      _tile_stored(0, ring + begun % RING * SUMS_BYTES, TILE_BYTES);
      written(ring);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m) store(c.total + m * BLOCK, total[m]);
  ahead = fetched;
}

template <int MT = TILE_WORDS> static void add_chunk(int mt, const BlockChunk& c, LinesAhead& ahead) {
  if (mt == MT) return add_chunk<MT>(c, ahead);
  if constexpr (MT > 1) add_chunk<MT - 1>(mt, c, ahead);
}

// All blocks times M rows of x.
template <class T> class QuantizedProduct {
 public:
  QuantizedProduct(const LinearQuantizedArgs& args, const Shape& shape, int64_t row0, int64_t rows)
      : a_(args), s_(shape), row0_(row0), M_(rows), tiles_((M_ + TILE_WORDS - 1) / TILE_WORDS),
        near_(M_ <= TILE_WORDS ? 1 : NEAR_BLOCKS), together_(M_ <= TILE_WORDS ? 1 : TASK_BLOCKS),
        chunk_(COLUMNS / s_.group_size), group_bytes_(s_.group_size * BLOCK * a_.weight.bits / 8),
        x_(a_, s_, row0, M_, tiles_, chunk_, Lie::by_row) {}

  void run() {
    const int64_t piece = std::max(2 * near_, PIECE_BYTES / s_.qdata_bytes);
    const int64_t grain = product_grain(s_.blocks, s_.columns * BLOCK * M_);
    parallel_for_then_pieces(s_.blocks, grain, piece, [&](int64_t begin, int64_t end) {
      const TileRegisters registers(int(std::min(COLUMNS_OF_TILE, s_.group_size) / 4));
      for (; begin < end; begin += together_) multiply(begin, std::min(begin + together_, end));
    });
  }

 private:
  int64_t groups_from(int64_t g) const { return std::min(chunk_, s_.groups - g); }
  const uint8_t* qdata(int64_t n, int64_t g) const {
    return a_.weight.qdata + n * s_.qdata_bytes + g * group_bytes_;
  }

  void multiply(int64_t n0, int64_t n1) const {
    const int64_t total_bytes = (n1 - n0) * M_ * TILE_BYTES, ring_bytes = RING * SUMS_BYTES;
    char* memory = reinterpret_cast<char*>(
        scratch<BlockChunk>((total_bytes + ring_bytes + near_ * CHUNK_BYTES) / 4));
    float* total = reinterpret_cast<float*>(memory);
    char* ring = memory + total_bytes;
    auto* bytes = reinterpret_cast<uint8_t*>(ring + ring_bytes);
    for (int64_t g = 0; g < s_.groups; g += chunk_) {
      for (int64_t n = n0; n < n1; n += near_) {
        const int64_t end = std::min(n + near_, n1);
        for (int64_t i = n; i < end; ++i) to_bytes(i, g, bytes + (i - n) * CHUNK_BYTES);
        LinesAhead ahead = ahead_of(n0, n1, end, g, groups_from(g) * tiles_ * (end - n));
        for_each_tile(M_, tiles_, [&](int64_t m, int MT) {
          for (int64_t i = n; i < end; ++i) {
            const int64_t at = (i * s_.groups + g) * BLOCK;
            const BlockChunk chunk{
                .w = bytes + (i - n) * CHUNK_BYTES,
                .is_signed = a_.weight.bits == 4 || !a_.weight.minima,
                .scales = static_cast<const f16*>(a_.weight.scales) + at,
                .minima = a_.weight.minima ? static_cast<const f16*>(a_.weight.minima) + at : nullptr,
                .groups = groups_from(g),
                .group_size = s_.group_size,
                .x = x_.tile(m, MT, g),
                .first = g == 0,
                .total = total + ((i - n0) * M_ + m) * BLOCK,
                .ring = ring,
            };
            add_chunk(MT, chunk, ahead);
          }
        });
      }
    }
    for (int64_t n = n0; n < n1; ++n) write<T>(total + (n - n0) * M_ * BLOCK, a_, row0_, M_, n, 1);
  }

  // A chunk of block n, a byte for each value: less the centre, where there are no minima.
  void to_bytes(int64_t n, int64_t g, uint8_t* to) const {
    const vi centre = set(int(0x01010101u * unsigned(centre_of(a_.weight))));
    const Table table = bytes_of_nibbles(a_.weight);
    const uint8_t* from = qdata(n, g);
    for (const uint8_t* end = from + groups_from(g) * group_bytes_; from < end; from += LINE) {
      const vi line = load_lanes(from);
      const vi low = a_.weight.bits == 4 ? look_up(table, low_nibbles(line)) : line;
      store_lanes(to, {_mm512_sub_epi8(low.v, centre.v)});
      to += LINE;
      if (a_.weight.bits == 8) continue;
      store_lanes(to, {_mm512_sub_epi8(look_up(table, high_nibbles(line)).v, centre.v)});
      to += LINE;
    }
    written(to);
  }

  // To fetch what follows the chunk of columns from group g on, of the blocks before n, in so many steps.
  LinesAhead ahead_of(int64_t n0, int64_t n1, int64_t n, int64_t g, int64_t steps) const {
    if (n == n1 && g + chunk_ < s_.groups) {
      n = n0;
      g += chunk_;
    } else if (n == n1) {
      g = 0;
    }
    if (n == s_.blocks) return {};
    return {qdata(n, g), std::min(near_, s_.blocks - n), groups_from(g) * group_bytes_ / LINE,
            s_.qdata_bytes, steps};
  }

  const LinearQuantizedArgs& a_;
  const Shape& s_;
  int64_t row0_, M_, tiles_, near_, together_, chunk_, group_bytes_;
  RoundedRows<T> x_;
};

}  // namespace tiles
}  // namespace ISA
}  // namespace llama_fast

#endif
