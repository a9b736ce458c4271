// GEMV (and skinny GEMM): y = x Wᵀ for few rows of x, limited by reading W, so W is read once, in
// whole rows.
//
// x is packed first, to the form that the products take. A thread then owns a contiguous block of
// W's rows and walks it in chunks; a chunk meets all rows of x while it is in L1. A tile of MT rows
// of x by NT rows of W stays in registers. How what comes next is fetched from memory meanwhile
// differs by CPU: see Walk in args.h.
//
// Order of a sum, the same for any M, tile and thread count: lane by lane along a chunk, chunk
// after chunk, then across the lanes. The two levels keep the rounding error of a long row small.
#include <algorithm>
#include <cstring>

#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../simd/dot.h"

namespace llama_fast {
namespace ISA {

static constexpr int MAX_M = GEMV_ROWS_BESIDE_GEMM;  // rows of x, at most
static constexpr int MAX_MT = 6;
static constexpr int BLOCK = 12;         // rows of W that a thread walks together, at most
static constexpr int STREAM_BLOCK = 24;  // and as a stream: memory is asked for that far ahead
// 2 KB of a bf16 row. A scalar build sums one by one, so it needs the short chunks for exactness.
static constexpr int CHUNK_STEPS = vf::W == 1 ? 32 : vf::W == 8 ? 64 : 32;

// Asks for the cache lines of `bytes` bytes: 3 for all caches, 2 for the second and what is beyond.
// Rows are too short, and change too often, for the hardware to foresee several at once: without
// this the walk of tiles reaches 0.8 of a plain read at C_in = 2048.
template <int CACHES> static inline void prefetch(const char* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, CACHES);
}

// What a tile asks memory for while it multiplies: nothing; the same rows of the chunk to come; or
// its share of the block to come, in the order of addresses.
enum class Fetch { nothing, chunk, stream };

// Rows of W in a tile of MT rows of x: what the registers hold. One row of x leaves room for as many
// as the second cache is asked for well; as many streams of its own would be too many for memory.
static constexpr int tile_width(int MT, Fetch fetch) {
  if (fetch == Fetch::nothing) return 1;
  if (vf::W >= 16) return MT == 1 && fetch == Fetch::stream ? 8 : MT <= 3 ? 6 : 4;
  return MT <= 2 ? 4 : MT == 3 ? 3 : 2;
}

// A chunk of some rows of W, the same chunk of x, and where the sums go: total[m * block + n].
template <class T> struct Chunk {
  const T* w;
  int64_t stride;
  int rows;
  const typename Dot<T>::Packed* x;  // group after group, each (steps, MT, STEP)
  int64_t M, steps;
  Fetch fetch;
  int64_t ahead;  // elements from this chunk to the one to come; from its block to the one to come
  vf* total;
  int64_t block;
};

// Rows of x that meet a tile together, and which of the groups of such rows they are.
struct Group { int m0, index, count; };

// acc[m][n] += the sum over one step's PART.
template <int PART, class T, int MT, int NT>
static inline void add_products(const T* w, int64_t stride, const typename Dot<T>::Packed* x,
                                vf (&acc)[MT][NT]) {
  using D = Dot<T>;
  vf wn[NT];
  for (int n = 0; n < NT; ++n) wn[n] = D::template weights<PART>(w + n * stride);
  for (int m = 0; m < MT; ++m) {
    const vf xm = keep(D::activations(x + m * D::STEP + PART * vf::W));
    for (int n = 0; n < NT; ++n) acc[m][n] = D::add(wn[n], xm, acc[m][n]);
  }
}

template <class T, int MT, int NT, Fetch FETCH>
static inline void tile(const Chunk<T>& c, Group group, int n0) {
  using D = Dot<T>;
  vf acc[MT][NT];
  for (auto& row : acc)
    for (vf& a : row) a = zero();
  const T* w = c.w + n0 * c.stride;
  auto x = c.x + group.m0 * c.steps * D::STEP;
  // The chunks of a block lie in the stream as if each were whole.
  constexpr int64_t BYTES = D::STEP * sizeof(T);
  const char* stream = reinterpret_cast<const char*>(c.w + c.ahead) + n0 * c.steps * BYTES;
  int64_t turn = group.index;  // groups take turns to fetch
  for (int64_t step = 0; step < c.steps; ++step, w += D::STEP, x += MT * D::STEP) {
    if (FETCH == Fetch::stream && step == turn) {
      prefetch<2>(stream + step * NT * BYTES, NT * BYTES);
      turn += group.count;
    }
    for (int n = 0; FETCH == Fetch::chunk && n < NT; ++n)
      prefetch<3>(reinterpret_cast<const char*>(w + n * c.stride + c.ahead), BYTES);
    add_products<0>(w, c.stride, x, acc);
    if constexpr (D::PARTS == 2) add_products<1>(anew(w), c.stride, x, acc);
  }
  // Without the pragmas GCC 12 keeps these loops, and with them all sums in memory.
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) {
      vf& total = c.total[(group.m0 + m) * c.block + n0 + n];
      total = total + acc[m][n];
    }
  }
}

template <class T, int MT, Fetch FETCH> static void tiles(const Chunk<T>& c, Group group) {
  constexpr int NT = tile_width(MT, FETCH);
  int n = 0;
  for (; n + NT <= c.rows; n += NT) tile<T, MT, NT, FETCH>(c, group, n);
  for (; n < c.rows; ++n) tile<T, MT, 1, FETCH>(c, group, n);
}

template <class T, int MT> static void tiles(const Chunk<T>& c, Group group) {
  switch (c.fetch) {
    case Fetch::nothing: return tiles<T, MT, Fetch::nothing>(c, group);
    case Fetch::chunk: return tiles<T, MT, Fetch::chunk>(c, group);
    case Fetch::stream: return tiles<T, MT, Fetch::stream>(c, group);
  }
}

// Calls f(group, MT) for groups of MT rows of x, as even as can be.
template <class F> static inline void for_each_group(int64_t M, F&& f) {
  const int groups = int(M + MAX_MT - 1) / MAX_MT;
  for (int i = 0; i < groups; ++i) {
    const int begin = int(M) * i / groups, end = int(M) * (i + 1) / groups;
    f(Group{begin, i, groups}, end - begin);
  }
}

template <class T> static void add_chunk(const Chunk<T>& c) {
  for_each_group(c.M, [&](Group group, int MT) {
    switch (MT) {
      case 1: tiles<T, 1>(c, group); break;
      case 2: tiles<T, 2>(c, group); break;
      case 3: tiles<T, 3>(c, group); break;
      case 4: tiles<T, 4>(c, group); break;
      case 5: tiles<T, 5>(c, group); break;
      case 6: tiles<T, 6>(c, group); break;
    }
  });
}

template <class T> static void multiply_rows(const LinearArgs& a) {
  using D = Dot<T>;
  using Packed = typename D::Packed;
  const T* weight = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y);
  const int64_t M = a.rows.count(), steps = a.C_in / D::STEP, tail = a.C_in % D::STEP;
  const size_t tail_bytes = size_t(tail) * sizeof(T);

  // In floats: room for Packed of any size.
  auto* packed = reinterpret_cast<Packed*>(scratch<LinearArgs>((steps + 1) * M * D::STEP));
  for_each_group(M, [&](Group group, int MT) {
    const int m0 = group.m0;
    for (int m = 0; m < MT; ++m) {
      const T* x = static_cast<const T*>(a.x) + a.rows.offset(m0 + m);
      for (int64_t s = 0; s < steps; s += CHUNK_STEPS) {
        const int64_t count = std::min<int64_t>(CHUNK_STEPS, steps - s);
        Packed* to = packed + (s * M + m0 * count + m) * D::STEP;
        for (int64_t i = 0; i < count; ++i)
          D::pack(x + (s + i) * D::STEP, to + i * MT * D::STEP);
      }
      T last[D::STEP] = {};
      std::memcpy(last, x + steps * D::STEP, tail_bytes);
      D::pack(last, packed + (steps * M + m0 + m) * D::STEP);
    }
  });

  // Few rows of x: whole rows of W are read through. More: each chunk stays in L1 for all of them.
  const bool stream = a.walk == Walk::stream;
  const Fetch fetch = stream ? Fetch::stream : Fetch::chunk;
  const int64_t block = M <= (stream ? 3 : MAX_MT) ? tile_width(int(M), fetch)
                        : stream ? STREAM_BLOCK : BLOCK;
  parallel_for(a.C_out, product_grain(a.C_out, a.C_in * M), [&](int64_t begin, int64_t end) {
    vf total[MAX_M * STREAM_BLOCK];
    for (int64_t n0 = begin; n0 < end; n0 += block) {
      const int rows = int(std::min(block, end - n0));
      const T* w = weight + n0 * a.C_in;
      for (int64_t i = 0; i < M * block; ++i) total[i] = zero();
      for (int64_t s = 0; s < steps; s += CHUNK_STEPS) {
        const int64_t count = std::min<int64_t>(CHUNK_STEPS, steps - s), k = s * D::STEP;
        const int64_t to_next = s + count < steps ? count * D::STEP : rows * a.C_in - k;
        // So many elements of the block to come have been asked for already.
        const int64_t to_stream = rows * a.C_in - k + rows * k;
        add_chunk<T>({w + k, a.C_in, rows, packed + k * M, M, count, fetch,
                      stream ? to_stream : to_next, total, block});
      }
      if (tail) {
        T last[STREAM_BLOCK * D::STEP] = {};
        for (int n = 0; n < rows; ++n)
          std::memcpy(last + n * D::STEP, w + n * a.C_in + steps * D::STEP, tail_bytes);
        add_chunk<T>({last, D::STEP, rows, packed + steps * M * D::STEP, M, 1, Fetch::nothing, 0,
                      total, block});
      }
      for (int64_t m = 0; m < M; ++m)
        for (int n = 0; n < rows; ++n)
          from_float(sum(total[m * block + n]), y[m * a.C_out + n0 + n]);
    }
  });
}

void gemv(const LinearArgs& a) {
  with_type(a.dtype, [&](auto t) { multiply_rows<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
