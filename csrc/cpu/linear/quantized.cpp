// y = x Wᵀ with W in integers of 8 or 4 bits, a scale (and a minimum) for each group of a row.
//
// Sixteen rows of W make a block, and lane r of a vector belongs to row r, so no sum runs across
// lanes and every load takes a whole line of memory, one after the other (docs/ops/linear.md
// draws it). Activations of a half type are rounded to signed bytes once per call, row by row and
// group by group; the products of a group are then summed exactly, in integers. float32 activations
// are multiplied by the weights' values instead.
//
// A thread owns a contiguous range of blocks, and then takes pieces of what is left. It takes two
// blocks at a time through all rows of x, in tiles of rows whose sums stay in registers; where there
// are several tiles, in chunks of columns that stay in L1, and there nibbles are unpacked first. Sums
// are taken group after group whatever the number of rows or threads, so neither changes a result.
#include <algorithm>
#include <cmath>

#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/bytes.h"

namespace llama_fast {
namespace ISA {

static constexpr int BLOCK = 16;              // rows of W
static constexpr int V = BLOCK / vf::W;       // vectors of a line: four bytes for each row
static constexpr int LINE = BLOCK * 4;
static constexpr int MAX_MT = vf::W == 16 ? 6 : 4;
static constexpr int MAX_NT = vf::W == 16 ? 2 : 1;
static constexpr int CHUNK = 512;             // columns; a multiple of every group size
static constexpr int FLOAT_CHUNK = 128, FLOAT_RUN = 16;
static constexpr int64_t SLAB = 512;          // rows of x that are packed at a time
static constexpr int64_t PIECE_BYTES = 1 << 16;  // of qdata, about: see parallel_for_then_pieces
static constexpr int UNPACK_FROM = 3;         // tiles of rows
// Bytes from what is used to what is fetched: far enough to have begun before a block ends.
static constexpr int QDATA_AHEAD = 2048, SCALES_AHEAD = 512;

// How the numbers of a line are stored, and which numbers they are.
struct TwoNibbles {
  using Kind = Nibble;
  static constexpr int STEPS = 2;
  static vi numbers(vi line, int step) {
    if (step == 0) return low_nibbles(line);
    return high_nibbles(line);
  }
};
template <class C> struct Bytes {
  using Kind = C;
  static constexpr int STEPS = 1;
  static vi numbers(vi line, int) { return line; }
};

// Rows of x as the products take them, tile after tile: a tile of MT rows is (columns / 4, MT, 4)
// bytes, and its scales and starts are (groups, MT).
struct Activations {
  int8_t* bytes;
  float* scales;
  float* sums;      // scale · Σ bytes of the group, for the minima
  int32_t* starts;  // where the sum of a group starts: what takes qdata's centre off again
};

// Some columns of one or two blocks of W, and of a tile of x.
struct Part {
  const uint8_t* qdata;
  const f16 *scales, *minima;  // of the first block; minima may be null
  int64_t qdata_stride, scale_stride;  // from a block to the next
  int64_t groups, group_size;
  Activations x;
  bool first;    // of its columns: the totals start here
  float* total;  // (MT, NT, BLOCK)
};

// Asks for what the next groups of NT blocks of scales or minima will need.
template <int NT> static inline void prefetch_group(const f16* p, const Part& part, int64_t g) {
  for (int n = 0; n < NT; ++n)
    __builtin_prefetch(reinterpret_cast<const char*>(p + n * part.scale_stride + g * BLOCK) +
                       SCALES_AHEAD);
}

template <int MT, int NT> struct Sums { vf of[MT][NT][V]; };

template <int MT, int NT> static inline Sums<MT, NT> load_totals(const Part& part) {
  Sums<MT, NT> total;
  for (int m = 0; m < MT; ++m)
    for (int n = 0; n < NT; ++n)
      for (int v = 0; v < V; ++v)
        total.of[m][n][v] =
            part.first ? zero() : load(part.total + (m * NT + n) * BLOCK + v * vf::W);
  return total;
}
template <int MT, int NT> static inline void store_totals(const Part& part, Sums<MT, NT>& total) {
  for (int m = 0; m < MT; ++m)
    for (int n = 0; n < NT; ++n)
      for (int v = 0; v < V; ++v)
        store(part.total + (m * NT + n) * BLOCK + v * vf::W, total.of[m][n][v]);
}

template <class Storage, int MT, int NT> static void add_quantized(const Part& part) {
  using Kind = typename Storage::Kind;
  Sums<MT, NT> total = load_totals<MT, NT>(part);
  const uint8_t* qdata = part.qdata;
  const int8_t* x = part.x.bytes;
  const int64_t lines = part.group_size / (4 * Storage::STEPS);
  for (int64_t g = 0; g < part.groups; ++g) {
    if (MT <= 2) prefetch_group<NT>(part.scales, part, g);
    if (MT <= 2 && part.minima) prefetch_group<NT>(part.minima, part, g);
    vi acc[MT][NT][V];
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n)
        for (int v = 0; v < V; ++v) acc[m][n][v] = set(part.x.starts[g * MT + m]);
    for (int64_t line = 0; line < lines; ++line, qdata += LINE) {
      vi stored[NT][V];
      for (int n = 0; n < NT; ++n) {
        for (int v = 0; v < V; ++v)
          stored[n][v] = load_lanes(qdata + n * part.qdata_stride + v * 4 * vf::W);
        // A page ends where the hardware stops to look ahead.
        if (MT <= 2) __builtin_prefetch(qdata + n * part.qdata_stride + QDATA_AHEAD);
      }
      for (int step = 0; step < Storage::STEPS; ++step, x += 4 * MT) {
        vi w[NT][V];
        for (int n = 0; n < NT; ++n)
          for (int v = 0; v < V; ++v)
            w[n][v] = Storage::numbers(stored[n][v], step);
        for (int m = 0; m < MT; ++m) {
          const vi xm = set_bytes(x + 4 * m);
          for (int n = 0; n < NT; ++n)
            for (int v = 0; v < V; ++v) acc[m][n][v] = dot(Kind{}, w[n][v], xm, acc[m][n][v]);
        }
      }
    }
    // Without the pragmas GCC 12 keeps these loops, and with them all sums in memory.
#pragma GCC unroll 8
    for (int i = 0; i < NT * V; ++i) {
      const int n = i / V, v = i % V;
      const vf scale = load(part.scales + n * part.scale_stride + g * BLOCK + v * vf::W);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        vf& t = total.of[m][n][v];
        t = fma(to_float(acc[m][n][v]), scale * set(part.x.scales[g * MT + m]), t);
      }
    }
    if (!part.minima) continue;
#pragma GCC unroll 8
    for (int i = 0; i < NT * V; ++i) {
      const int n = i / V, v = i % V;
      const vf minimum = load(part.minima + n * part.scale_stride + g * BLOCK + v * vf::W);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        vf& t = total.of[m][n][v];
        t = fma(minimum, set(part.x.sums[g * MT + m]), t);
      }
    }
  }
  store_totals<MT, NT>(part, total);
}

// The sums of a chunk of columns, weights (columns, NT, BLOCK) times x (columns, MT); in two levels,
// so that the rounding error of a long row stays small.
template <int MT, int NT>
static void add_floats(const float* w, const float* x, int64_t columns, const Part& part) {
  Sums<MT, NT> total = load_totals<MT, NT>(part);
  for (int64_t begin = 0; begin < columns; begin += FLOAT_RUN) {
    vf acc[MT][NT][V];
    for (auto& rows : acc)
      for (auto& block : rows)
        for (vf& a : block) a = zero();
    for (int c = 0; c < FLOAT_RUN; ++c, w += NT * BLOCK, x += MT) {
      for (int m = 0; m < MT; ++m)
        for (int n = 0; n < NT; ++n)
          for (int v = 0; v < V; ++v)
            acc[m][n][v] = fma(load(w + n * BLOCK + v * vf::W), set(x[m]), acc[m][n][v]);
    }
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n)
        for (int v = 0; v < V; ++v) total.of[m][n][v] = total.of[m][n][v] + acc[m][n][v];
  }
  store_totals<MT, NT>(part, total);
}

// Calls f(constant MT, NT) for the two numbers at run time.
template <int N> struct Constant { static constexpr int value = N; };
template <int MT = MAX_MT, int NT = MAX_NT, class F>
static inline void with_tile(int mt, int nt, F&& f) {
  if (nt < NT) {
    if constexpr (NT > 1) return with_tile<MT, NT - 1>(mt, nt, f);
  } else if (mt < MT) {
    if constexpr (MT > 1) return with_tile<MT - 1, NT>(mt, nt, f);
  } else {
    f(Constant<MT>{}, Constant<NT>{});
  }
}

// Calls f(m, MT) for the tiles of rows, as even as can be.
static inline int64_t tiles_of(int64_t M) { return (M + MAX_MT - 1) / MAX_MT; }
template <class F> static inline void for_each_tile(int64_t M, F&& f) {
  const int64_t tiles = tiles_of(M);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = M * i / tiles, end = M * (i + 1) / tiles;
    f(begin, int(end - begin));
  }
}

// The shape of a call, its columns filled up to whole groups.
struct Shape {
  int64_t columns, groups, group_size, blocks;
  int64_t qdata_bytes;  // of a block
  explicit Shape(const LinearQuantizedArgs& a)
      : columns((a.C_in + a.group_size - 1) / a.group_size * a.group_size),
        groups(columns / a.group_size), group_size(a.group_size),
        blocks((a.C_out + BLOCK - 1) / BLOCK), qdata_bytes(columns * BLOCK * a.bits / 8) {}
};

// One group of one row of x, to signed bytes: q = round(x / scale), scale = max |x| / 127.
struct Rounded { float scale, sum; };
static inline Rounded round_group(const float* x, int64_t n, int8_t* q) {
  vf largest = zero(), check = zero();
  for (int64_t i = 0; i < n; i += vf::W) {
    const vf value = load(x + i);
    largest = max(largest, max(value, zero() - value));
    check = fma(value, zero(), check);  // NaN where any value is NaN or infinite
  }
  const float scale = max_of(largest) / 127.f + sum(check);
  if (!(scale > 0.f)) {  // all zero, or not finite
    std::memset(q, 0, size_t(n));
    return {scale, scale};
  }
  vf total = zero();
  for (int64_t i = 0; i < n; i += vf::W) {
    const vf rounded = round(load(x + i) / set(scale));
    store_bytes(q + i, rounded);
    total = total + rounded;
  }
  return {scale, sum(total)};
}

// Row m of the tile of MT rows: to bytes, into its words of the tile.
template <class T>
static void round_row(const T* x, const LinearQuantizedArgs& a, const Shape& s, int bias, int m,
                      int MT, const Activations& tile) {
  alignas(64) float values[128];
  alignas(64) int8_t q[128];
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t begin = g * s.group_size, n = std::min(s.group_size, a.C_in - begin);
    for_each_vector(n, [&](int64_t i, auto width) { store(values + i, load(x + begin + i, width)); });
    std::fill(values + n, values + s.group_size, 0.f);
    const Rounded r = round_group(values, s.group_size, q);
    int8_t* to = tile.bytes + begin * MT + 4 * m;
    for (int64_t i = 0; i < s.group_size; i += 4) std::memcpy(to + i * MT, q + i, 4);
    const int64_t at = g * MT + m;
    const int centre = a.minima ? 0 : a.bits == 8 ? 128 : 8;
    tile.scales[at] = r.scale;
    tile.sums[at] = r.scale * r.sum;
    tile.starts[at] = std::isfinite(r.sum) ? int32_t(r.sum) * (bias - centre) : 0;
  }
}

// Nibbles of `lines` lines → one byte each.
static void unpack(const uint8_t* qdata, int64_t lines, uint8_t* to) {
  for (int64_t i = 0; i < lines; ++i, qdata += LINE, to += 2 * LINE) {
    for (int v = 0; v < V; ++v) {
      const vi line = load_lanes(qdata + v * 4 * vf::W);
      store_lanes(to + v * 4 * vf::W, low_nibbles(line));
      store_lanes(to + LINE + v * 4 * vf::W, high_nibbles(line));
    }
  }
}

// Blocks n0 … n0 + NT of y: the rows' totals, rounded.
template <class T>
static void write(const float* total, const LinearQuantizedArgs& a, int64_t row0, int64_t rows,
                  int64_t n0, int NT) {
  const int64_t begin = n0 * BLOCK, n = std::min<int64_t>(NT * BLOCK, a.C_out - begin);
  for (int64_t m = 0; m < rows; ++m) {
    T* y = static_cast<T*>(a.y) + (row0 + m) * a.C_out + begin;
    const float* t = total + m * NT * BLOCK;
    for_each_vector(n, [&](int64_t i, auto width) { store(y + i, load(t + i), width); });
  }
}

// Calls f(n0, NT, scratch) for the blocks of each thread.
template <class F> static void for_each_blocks(const Shape& s, int64_t M, F&& f) {
  const int64_t n = (s.blocks + MAX_NT - 1) / MAX_NT, each = s.columns * BLOCK * MAX_NT * M;
  const int64_t piece = std::max<int64_t>(1, PIECE_BYTES / (s.qdata_bytes * MAX_NT));
  parallel_for_then_pieces(n, product_grain(n, each), piece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      f(i * MAX_NT, int(std::min<int64_t>(MAX_NT, s.blocks - i * MAX_NT)));
  });
}

// A chunk of the columns of some blocks of W, `groups` groups from g0 on; without a tile of x.
static Part part_of(const LinearQuantizedArgs& a, const Shape& s, int64_t n0, int64_t g0,
                    int64_t groups) {
  const int64_t scale_stride = s.groups * BLOCK, at = n0 * scale_stride + g0 * BLOCK;
  return {
      .qdata = a.qdata + n0 * s.qdata_bytes + g0 * s.group_size * BLOCK * a.bits / 8,
      .scales = static_cast<const f16*>(a.scales) + at,
      .minima = a.minima ? static_cast<const f16*>(a.minima) + at : nullptr,
      .qdata_stride = s.qdata_bytes,
      .scale_stride = scale_stride,
      .groups = std::min(groups, s.groups - g0),
      .group_size = s.group_size,
      .x = {},
      .first = g0 == 0,
      .total = nullptr,
  };
}

template <class T>
static void by_bytes(const LinearQuantizedArgs& a, const Shape& s, int64_t row0, int64_t M) {
  const int64_t tiles = tiles_of(M);
  const bool nibbles = a.bits == 4, unpacked = nibbles && tiles >= UNPACK_FROM;
  const int bias = nibbles ? BIAS<Nibble> : BIAS<Byte>;

  float* memory = scratch<Activations>(M * (s.columns / 4 + 3 * s.groups));
  const Activations all{reinterpret_cast<int8_t*>(memory + 3 * M * s.groups), memory,
                        memory + M * s.groups,
                        reinterpret_cast<int32_t*>(memory + 2 * M * s.groups)};
  auto tile_of = [&](int64_t m0, int MT, int64_t g0) {
    const int64_t at = m0 * s.groups + g0 * MT;
    return Activations{all.bytes + m0 * s.columns + g0 * s.group_size * MT, all.scales + at,
                       all.sums + at, all.starts + at};
  };
  parallel_for(tiles, 1 + 8192 / (s.columns * MAX_MT), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m0 = M * i / tiles;
      const int MT = int(M * (i + 1) / tiles - m0);
      for (int m = 0; m < MT; ++m) {
        const T* x = static_cast<const T*>(a.x) + a.rows.offset(row0 + m0 + m);
        round_row(x, a, s, bias, m, MT, tile_of(m0, MT, 0));
      }
    }
  });

  const int64_t chunk = tiles == 1 ? s.groups : std::max<int64_t>(1, CHUNK / s.group_size);
  for_each_blocks(s, M, [&](int64_t n0, int NT) {
    float* total = scratch<LinearQuantizedArgs>(M * NT * BLOCK + (unpacked ? MAX_NT * CHUNK * 4 : 0));
    auto* bytes = reinterpret_cast<uint8_t*>(total + M * NT * BLOCK);
    for (int64_t g0 = 0; g0 < s.groups; g0 += chunk) {
      Part part = part_of(a, s, n0, g0, chunk);
      const int64_t columns = part.groups * s.group_size;
      if (unpacked) {
        for (int n = 0; n < NT; ++n)
          unpack(part.qdata + n * s.qdata_bytes, columns / 8, bytes + n * CHUNK * BLOCK);
        part.qdata = bytes;
        part.qdata_stride = CHUNK * BLOCK;
      }
      for_each_tile(M, [&](int64_t m0, int mt) {
        part.x = tile_of(m0, mt, g0);
        part.total = total + m0 * NT * BLOCK;
        with_tile(mt, NT, [&](auto MT, auto NT) {
          constexpr int rows = decltype(MT)::value, wide = decltype(NT)::value;
          if (unpacked) add_quantized<Bytes<Nibble>, rows, wide>(part);
          else if (nibbles) add_quantized<TwoNibbles, rows, wide>(part);
          else add_quantized<Bytes<Byte>, rows, wide>(part);
        });
      });
    }
    write<T>(total, a, row0, M, n0, NT);
  });
}

// The values of `groups` groups of NT blocks, (columns, NT, BLOCK).
static void dequantize(const Part& part, int bits, int NT, float* to) {
  const int64_t steps = bits == 8 ? 1 : 2, lines = part.group_size / (4 * steps);
  const float centre = bits == 8 ? 128.f : 8.f;
  for (int n = 0; n < NT; ++n) {
    for (int v = 0; v < V; ++v) {
      const uint8_t* qdata = part.qdata + n * part.qdata_stride + v * 4 * vf::W;
      float* w = to + n * BLOCK + v * vf::W;
      for (int64_t g = 0; g < part.groups; ++g) {
        const int64_t at = n * part.scale_stride + g * BLOCK + v * vf::W;
        const vf scale = load(part.scales + at);
        const vf minimum = part.minima ? load(part.minima + at) : scale * set(-centre);
        for (int64_t line = 0; line < lines; ++line, qdata += LINE) {
          const vi stored = load_lanes(qdata);
          for (int step = 0; step < steps; ++step, w += 4 * NT * BLOCK) {
            const vi four = bits == 8 ? stored : step ? high_nibbles(stored) : low_nibbles(stored);
            store(w, fma(to_float(byte_of<0>(four)), scale, minimum));
            store(w + NT * BLOCK, fma(to_float(byte_of<1>(four)), scale, minimum));
            store(w + 2 * NT * BLOCK, fma(to_float(byte_of<2>(four)), scale, minimum));
            store(w + 3 * NT * BLOCK, fma(to_float(byte_of<3>(four)), scale, minimum));
          }
        }
      }
    }
  }
}

static void by_values(const LinearQuantizedArgs& a, const Shape& s, int64_t row0, int64_t M) {
  // A tile of x is (columns, MT), zero beyond C_in.
  float* x = scratch<Activations>(M * s.columns);
  for_each_tile(M, [&](int64_t m0, int MT) {
    for (int m = 0; m < MT; ++m) {
      const float* row = static_cast<const float*>(a.x) + a.rows.offset(row0 + m0 + m);
      float* to = x + m0 * s.columns + m;
      for (int64_t c = 0; c < s.columns; ++c) to[c * MT] = c < a.C_in ? row[c] : 0.f;
    }
  });
  const int64_t chunk = FLOAT_CHUNK / s.group_size;
  for_each_blocks(s, M, [&](int64_t n0, int NT) {
    float* total = scratch<LinearQuantizedArgs>(M * NT * BLOCK + FLOAT_CHUNK * MAX_NT * BLOCK);
    float* values = total + M * NT * BLOCK;
    for (int64_t g0 = 0; g0 < s.groups; g0 += chunk) {
      Part part = part_of(a, s, n0, g0, chunk);
      dequantize(part, a.bits, NT, values);
      for_each_tile(M, [&](int64_t m0, int mt) {
        part.total = total + m0 * NT * BLOCK;
        const float* tile = x + m0 * s.columns + g0 * s.group_size * mt;
        with_tile(mt, NT, [&](auto MT, auto NT) {
          add_floats<decltype(MT)::value, decltype(NT)::value>(
              values, tile, part.groups * s.group_size, part);
        });
      });
    }
    write<float>(total, a, row0, M, n0, NT);
  });
}

void linear_quantized(const LinearQuantizedArgs& a) {
  const Shape shape(a);
  const int64_t M = a.rows.count();
  for (int64_t row = 0; row < M; row += SLAB) {
    const int64_t rows = std::min(SLAB, M - row);
    switch (a.dtype) {
      case DType::f32: by_values(a, shape, row, rows); break;
      case DType::bf16: by_bytes<bf16>(a, shape, row, rows); break;
      case DType::f16: by_bytes<f16>(a, shape, row, rows); break;
    }
  }
}

}  // namespace ISA
}  // namespace llama_fast
