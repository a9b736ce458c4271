// AMX: eight tile registers of 16 rows of 64 bytes, and instructions that multiply two of them.
//
// sums[m][n] += Σ_k left[m][k] · right[k][n]. A row of `left` runs along k. A row of `right` holds 4
// bytes for each n, which run along k too: 2 bf16 or 4 bytes.
//
// Order of a sum of bf16, whose terms are never rounded: over the 16 rows of `right`, the first and
// the second numbers by themselves; then both together; then to what was there.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "half.h"

namespace llama_fast {
namespace ISA {

// Whether the tile registers multiply numbers of this type.
template <class T> constexpr bool BY_TILES = false;

#ifdef ISA_AMX
#define ISA_HAS_TILES 1
template <> constexpr bool BY_TILES<bf16> = true;

constexpr int TILE_WORDS = 16;      // rows of a tile, and words of its rows
constexpr int64_t TILE_BYTES = 64;  // of a row

// What the compiler does not know of the intrinsics: they read memory.
static inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// The registers are this thread's from here to the end of the block; their numbers are literals.
class TileRegisters {
 public:
  // 0 to 3 for sums, 4 and 5 for left sides, 6 and 7 for right sides of so many rows.
  explicit TileRegisters(int right_rows = TILE_WORDS) {
    Config config;
    for (int i = 0; i < 8; ++i) {
      const bool left = i == 4 || i == 5, right = i >= 6;
      config.bytes[i] = uint16_t(left ? right_rows * 4 : TILE_BYTES);
      config.rows[i] = uint8_t(right ? right_rows : TILE_WORDS);
    }
    written(&config);
    _tile_loadconfig(&config);
  }
  // Programs that are interrupted need not save them any more.
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;

 private:
  struct Config {  // as the instruction reads it
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
};
#endif

}  // namespace ISA
}  // namespace llama_fast
