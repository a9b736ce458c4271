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
// are several tiles, in chunks of columns that stay in L1, and there nibbles are unpacked first. With
// tile registers, many rows take quantized_tiles.h instead. Sums are taken group after group whatever
// the number of rows or threads, so neither changes a result.
#include "quantized.h"
#include "quantized_tiles.h"

namespace llama_fast {
namespace ISA {

static constexpr int MAX_MT = vf::W == 16 ? 6 : 4;
static constexpr int MAX_NT = vf::W == 16 ? 2 : 1;
static constexpr int CHUNK = 512;             // columns; a multiple of every group size
static constexpr int FLOAT_CHUNK = 128, FLOAT_RUN = 16;
static constexpr int64_t SLAB = 512;          // rows of x that are packed at a time
static constexpr int UNPACK_FROM = 3;         // tiles of rows
// Bytes from what is used to what is fetched, where that is no stream: begun before a block ends.
static constexpr int QDATA_AHEAD = 2048, SCALES_AHEAD = 512;
static constexpr int STREAM_AHEAD = 1024;     // bytes of a stream that is read by itself as well

// How the bytes of a line are stored, and which bytes they are.
struct TwoNibbles {
  using Kind = SmallByte;
  static constexpr int STEPS = 2;
  static vi bytes(Table table, vi line, int step) {
    return look_up(table, step == 0 ? low_nibbles(line) : high_nibbles(line));
  }
};
template <class C> struct Bytes {
  using Kind = C;
  static constexpr int STEPS = 1;
  static vi bytes(Table, vi line, int) { return line; }
};

// What is fetched in passing. Of qdata each line asks for a line for each block, `stride` apart, and the next
// for `step` bytes on. Of the scales each group asks for those of each block that lie so many elements on.
struct Fetch {
  const uint8_t* next;
  int64_t step, stride;
  int64_t scales, scales_stride, scales_step;
  bool stream;  // into the second cache
};
template <int NT, class P> static inline void prefetch(const P* p, int64_t stride, bool stream) {
  for (int n = 0; n < NT; ++n) {
    if (stream) __builtin_prefetch(p + n * stride, 0, 2);
    else __builtin_prefetch(p + n * stride);
  }
}

// Some columns of one or two blocks of W, and of a tile of x.
struct Part {
  const uint8_t* qdata;
  const f16 *scales, *minima;  // of the first block; minima may be null
  int64_t qdata_stride, scale_stride;  // from a block to the next
  int64_t groups, group_size;
  Table table;  // bytes of nibbles
  Activations x;
  bool first;    // of its columns: the totals start here
  float* total;  // (MT, NT, BLOCK)
  Fetch fetch;
};

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
  const Table table = part.table;
  Fetch fetch = part.fetch;
  const int8_t* x = part.x.bytes;
  const int64_t lines = part.group_size / (4 * Storage::STEPS);
  for (int64_t g = 0; g < part.groups; ++g) {
    const int64_t later = fetch.scales + g * fetch.scales_step;
    prefetch<NT>(part.scales + later, fetch.scales_stride, fetch.stream);
    if (part.minima) prefetch<NT>(part.minima + later, fetch.scales_stride, fetch.stream);
    vi acc[MT][NT][V];
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n)
        for (int v = 0; v < V; ++v) acc[m][n][v] = set(part.x.starts[g * MT + m]);
    for (int64_t line = 0; line < lines; ++line, qdata += LINE) {
      vi stored[NT][V];
      for (int n = 0; n < NT; ++n)
        for (int v = 0; v < V; ++v)
          stored[n][v] = load_lanes(qdata + n * part.qdata_stride + v * 4 * vf::W);
      // A page ends where the hardware stops to look ahead.
      prefetch<NT>(fetch.next, fetch.stride, fetch.stream);
      fetch.next += fetch.step;
      for (int step = 0; step < Storage::STEPS; ++step, x += 4 * MT) {
        vi w[NT][V];
        for (int n = 0; n < NT; ++n)
          for (int v = 0; v < V; ++v)
            w[n][v] = Storage::bytes(table, stored[n][v], step);
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

static inline int64_t tiles_of(int64_t M) { return (M + MAX_MT - 1) / MAX_MT; }

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

// Nibbles of `lines` lines → one byte each.
static void unpack(Table table, const uint8_t* qdata, int64_t lines, uint8_t* to) {
  for (int64_t i = 0; i < lines; ++i, qdata += LINE, to += 2 * LINE) {
    for (int v = 0; v < V; ++v) {
      const vi line = load_lanes(qdata + v * 4 * vf::W);
      store_lanes(to + v * 4 * vf::W, look_up(table, low_nibbles(line)));
      store_lanes(to + LINE + v * 4 * vf::W, look_up(table, high_nibbles(line)));
    }
  }
}

// Calls f(n0, NT, scratch) for the blocks of each thread.
template <class F> static void for_each_blocks(const Shape& s, int64_t M, int NT, F&& f) {
  const int64_t n = (s.blocks + NT - 1) / NT, each = s.columns * BLOCK * NT * M;
  const int64_t piece = std::max<int64_t>(1, PIECE_BYTES / (s.qdata_bytes * NT));
  parallel_for_then_pieces(n, product_grain(n, each), piece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      f(i * NT, int(std::min<int64_t>(NT, s.blocks - i * NT)));
  });
}

// One tile of rows of x has whole blocks for itself. It fetches what it will soon need; or the blocks to
// come, as one stream of addresses, which a single block is anyway.
static Fetch fetch_of_one_tile(const LinearQuantizedArgs& a, const Shape& s, const Part& part, int NT) {
  if (a.walk == Walk::stream && NT == 1)
    return {part.qdata + STREAM_AHEAD, LINE, LINE, STREAM_AHEAD / BLOCK, BLOCK, BLOCK, true};
  if (a.walk == Walk::stream)
    return {part.qdata + NT * s.qdata_bytes, NT * LINE, LINE,
            NT * part.scale_stride, BLOCK, NT * BLOCK, true};
  return {part.qdata + QDATA_AHEAD, LINE, s.qdata_bytes,
          SCALES_AHEAD / int64_t(sizeof(f16)), part.scale_stride, BLOCK, false};
}

// Several tiles meet a chunk, and each fetches its share of the next one.
static Fetch fetch_of_tiles(const Shape& s, const Part& part, int64_t bytes, int64_t share, int64_t lines) {
  return {part.qdata + bytes, share / lines, s.qdata_bytes,
          SCALES_AHEAD / int64_t(sizeof(f16)), part.scale_stride, BLOCK, false};
}

// A chunk of the columns of some blocks of W, `groups` groups from g0 on; without a tile of x.
static Part part_of(const LinearQuantizedArgs& a, const Shape& s, int64_t n0, int64_t g0,
                    int64_t groups) {
  const int64_t scale_stride = s.groups * BLOCK, at = n0 * scale_stride + g0 * BLOCK;
  return {
      .qdata = a.weight.qdata + n0 * s.qdata_bytes + g0 * s.group_size * BLOCK * a.weight.bits / 8,
      .scales = static_cast<const f16*>(a.weight.scales) + at,
      .minima = a.weight.minima ? static_cast<const f16*>(a.weight.minima) + at : nullptr,
      .qdata_stride = s.qdata_bytes,
      .scale_stride = scale_stride,
      .groups = std::min(groups, s.groups - g0),
      .group_size = s.group_size,
      .table = bytes_of_nibbles(a.weight),
      .x = {},
      .first = g0 == 0,
      .total = nullptr,
      .fetch = {},
  };
}

template <class T>
static void by_bytes(const LinearQuantizedArgs& a, const Shape& s, int64_t row0, int64_t M) {
#ifdef ISA_HAS_TILES
  if (M >= quantized_tile_rows(a.weight.bits)) return tiles::QuantizedProduct<T>(a, s, row0, M).run();
#endif
  const int64_t tiles = tiles_of(M);
  const bool nibbles = a.weight.bits == 4, unpacked = nibbles && tiles >= UNPACK_FROM;
  const int64_t chunk = tiles == 1 ? s.groups : std::max<int64_t>(1, CHUNK / s.group_size);
  const RoundedRows<T> x(a, s, row0, M, tiles, chunk, Lie::by_four);
  // One row of x does so little that a single block, which lies in memory as it is read, is faster.
  const int width = a.walk == Walk::stream && M == 1 ? 1 : MAX_NT;
  for_each_blocks(s, M, width, [&](int64_t n0, int NT) {
    float* total = scratch<LinearQuantizedArgs>(M * NT * BLOCK + (unpacked ? MAX_NT * CHUNK * 4 : 0));
    auto* bytes_of_chunk = reinterpret_cast<uint8_t*>(total + M * NT * BLOCK);
    for (int64_t g0 = 0; g0 < s.groups; g0 += chunk) {
      Part part = part_of(a, s, n0, g0, chunk);
      const int64_t columns = part.groups * s.group_size, bytes = columns * BLOCK * a.weight.bits / 8;
      const int64_t share = bytes / tiles, lines = bytes / LINE * (unpacked ? 2 : 1);
      part.fetch = tiles == 1 ? fetch_of_one_tile(a, s, part, NT)
                              : fetch_of_tiles(s, part, bytes, share, lines);
      if (unpacked) {
        for (int n = 0; n < NT; ++n)
          unpack(part.table, part.qdata + n * s.qdata_bytes, columns / 8, bytes_of_chunk + n * CHUNK * BLOCK);
        part.qdata = bytes_of_chunk;
        part.qdata_stride = CHUNK * BLOCK;
      }
      for_each_tile(M, tiles, [&](int64_t m0, int mt) {
        part.x = x.tile(m0, mt, g0);
        part.total = total + m0 * NT * BLOCK;
        with_tile(mt, NT, [&](auto MT, auto NT) {
          constexpr int rows = decltype(MT)::value, wide = decltype(NT)::value;
          if (unpacked) add_quantized<Bytes<SmallByte>, rows, wide>(part);
          else if (nibbles) add_quantized<TwoNibbles, rows, wide>(part);
          else add_quantized<Bytes<Byte>, rows, wide>(part);
        });
        part.fetch.next += share;
      });
    }
    write<T>(total, a, row0, M, n0, NT);
  });
}

// The values of `groups` groups of NT blocks, (columns, NT, BLOCK).
template <int BITS> static void dequantize(const Part& part, int centre, int NT, float* to) {
  constexpr int columns = 32 / BITS;
  const int64_t lines = part.group_size / columns;
  for (int n = 0; n < NT; ++n) {
    for (int v = 0; v < V; ++v) {
      const uint8_t* qdata = part.qdata + n * part.qdata_stride + v * 4 * vf::W;
      float* w = to + n * BLOCK + v * vf::W;
      for (int64_t g = 0; g < part.groups; ++g) {
        const int64_t at = n * part.scale_stride + g * BLOCK + v * vf::W;
        const vf scale = load(part.scales + at);
        const vf minimum = minimum_of(part.minima ? part.minima + at : nullptr, scale, centre);
        for (int64_t line = 0; line < lines; ++line, qdata += LINE, w += columns * NT * BLOCK)
          dequantize_line<BITS>(load_lanes(qdata), part.table, scale, minimum,
                                [&](int i, vf numbers) { store(w + i * NT * BLOCK, numbers); });
      }
    }
  }
}

static void by_values(const LinearQuantizedArgs& a, const Shape& s, int64_t row0, int64_t M) {
  // A tile of x is (columns, MT), zero beyond C_in.
  float* x = scratch<Activations>(M * s.columns);
  for_each_tile(M, tiles_of(M), [&](int64_t m0, int MT) {
    for (int m = 0; m < MT; ++m) {
      const float* row = static_cast<const float*>(a.x) + a.rows.offset(row0 + m0 + m);
      float* to = x + m0 * s.columns + m;
      for (int64_t c = 0; c < s.columns; ++c) to[c * MT] = c < a.weight.C_in ? row[c] : 0.f;
    }
  });
  const int64_t chunk = FLOAT_CHUNK / s.group_size;
  for_each_blocks(s, M, MAX_NT, [&](int64_t n0, int NT) {
    float* total = scratch<LinearQuantizedArgs>(M * NT * BLOCK + FLOAT_CHUNK * MAX_NT * BLOCK);
    float* values = total + M * NT * BLOCK;
    for (int64_t g0 = 0; g0 < s.groups; g0 += chunk) {
      Part part = part_of(a, s, n0, g0, chunk);
      const int centre = centre_of(a.weight);
      if (a.weight.bits == 8) dequantize<8>(part, centre, NT, values);
      else dequantize<4>(part, centre, NT, values);
      for_each_tile(M, tiles_of(M), [&](int64_t m0, int mt) {
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
  const Shape shape(a.weight);
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
