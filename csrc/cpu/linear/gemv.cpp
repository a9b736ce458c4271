// GEMV (and skinny GEMM): y = x Wᵀ for few rows of x, limited by reading W, so W is read once, in
// whole rows.
//
// x is packed first, to the form that the products take. A thread then owns a contiguous block of
// W's rows and walks it in chunks; a chunk meets all rows of x while it is in L1. A tile of MT rows
// of x by NT rows of W stays in registers. Few rows of x may meet one row of W after the other
// instead, by CPU: see Walk in args.h.
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
static constexpr int BLOCK = 12;  // rows of W that a thread walks together, at most
// 2 KB of a bf16 row. A scalar build sums one by one, so it needs the short chunks for exactness.
static constexpr int CHUNK_STEPS = vf::W == 1 ? 32 : vf::W == 8 ? 64 : 32;

// Rows of W in a tile of MT rows of x: what the registers hold.
static constexpr int tile_width(int MT) {
  if (vf::W >= 16) return MT <= 3 ? 6 : 4;
  return MT <= 2 ? 4 : MT == 3 ? 3 : 2;
}

// Asks for the cache lines of `bytes` bytes. Rows are too short, and change too often, for the
// hardware to foresee them: without this the walk reaches 0.8 of a plain read at C_in = 2048.
static inline void prefetch(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(p) + i);
}

// A chunk of some rows of W, the same chunk of x, and where the sums go: total[m * BLOCK + n].
template <class T> struct Chunk {
  const T* w;
  int64_t stride;
  int rows;
  const typename Dot<T>::Packed* x;  // group after group, each (steps, MT, STEP)
  int64_t M, steps;
  int64_t ahead;  // elements from this chunk to the one that comes next, to fetch; or 0
  vf* total;
};

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

template <class T, int MT, int NT, bool FETCH = true>
static inline void tile(const Chunk<T>& c, int m0, int n0) {
  using D = Dot<T>;
  vf acc[MT][NT];
  for (auto& row : acc)
    for (vf& a : row) a = zero();
  const T* w = c.w + n0 * c.stride;
  auto x = c.x + m0 * c.steps * D::STEP;
  for (int64_t step = 0; step < c.steps; ++step, w += D::STEP, x += MT * D::STEP) {
    for (int n = 0; FETCH && n < NT; ++n)
      prefetch(w + n * c.stride + c.ahead, D::STEP * sizeof(T));
    add_products<0>(w, c.stride, x, acc);
    if constexpr (D::PARTS == 2) add_products<1>(anew(w), c.stride, x, acc);
  }
  // Without the pragmas GCC 12 keeps these loops, and with them all sums in memory.
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) {
      vf& total = c.total[(m0 + m) * BLOCK + n0 + n];
      total = total + acc[m][n];
    }
  }
}

template <class T, int MT> static void tiles(const Chunk<T>& c, int m0) {
  constexpr int NT = tile_width(MT);
  int n = 0;
  if (!c.ahead)
    for (; n < c.rows; ++n) tile<T, MT, 1, false>(c, m0, n);
  for (; n + NT <= c.rows; n += NT) tile<T, MT, NT>(c, m0, n);
  for (; n < c.rows; ++n) tile<T, MT, 1>(c, m0, n);
}

// Calls f(m, MT) for groups of MT rows of x, as even as can be.
template <class F> static inline void for_each_group(int64_t M, F&& f) {
  const int groups = int(M + MAX_MT - 1) / MAX_MT;
  for (int i = 0; i < groups; ++i) {
    const int begin = int(M) * i / groups, end = int(M) * (i + 1) / groups;
    f(begin, end - begin);
  }
}

template <class T> static void add_chunk(const Chunk<T>& c) {
  for_each_group(c.M, [&](int m, int MT) {
    switch (MT) {
      case 1: tiles<T, 1>(c, m); break;
      case 2: tiles<T, 2>(c, m); break;
      case 3: tiles<T, 3>(c, m); break;
      case 4: tiles<T, 4>(c, m); break;
      case 5: tiles<T, 5>(c, m); break;
      case 6: tiles<T, 6>(c, m); break;
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
  for_each_group(M, [&](int m0, int MT) {
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

  // One group of rows of x: whole rows of W are read through. Several: each chunk stays in L1 for
  // all of them.
  const bool one_by_one = a.walk == Walk::rows && M <= MAX_MT;
  const int block = one_by_one ? 1 : M <= MAX_MT ? tile_width(int(M)) : BLOCK;
  parallel_for(a.C_out, product_grain(a.C_out, a.C_in * M), [&](int64_t begin, int64_t end) {
    for (int64_t n0 = begin; n0 < end; n0 += block) {
      const int rows = int(std::min<int64_t>(block, end - n0));
      const T* w = weight + n0 * a.C_in;
      vf total[MAX_M * BLOCK];
      for (int64_t i = 0; i < M * BLOCK; ++i) total[i] = zero();
      for (int64_t s = 0; s < steps; s += CHUNK_STEPS) {
        const int64_t count = std::min<int64_t>(CHUNK_STEPS, steps - s);
        const bool last = s + count >= steps;
        const int64_t ahead = one_by_one ? 0 : last ? rows * a.C_in - s * D::STEP : count * D::STEP;
        add_chunk<T>({w + s * D::STEP, a.C_in, rows, packed + s * M * D::STEP, M, count, ahead,
                      total});
      }
      if (tail) {
        T last[BLOCK * D::STEP] = {};
        for (int n = 0; n < rows; ++n)
          std::memcpy(last + n * D::STEP, w + n * a.C_in + steps * D::STEP, tail_bytes);
        add_chunk<T>({last, D::STEP, rows, packed + steps * M * D::STEP, M, 1, 0, total});
      }
      for (int64_t m = 0; m < M; ++m)
        for (int n = 0; n < rows; ++n)
          from_float(sum(total[m * BLOCK + n]), y[m * a.C_out + n0 + n]);
    }
  });
}

void gemv(const LinearArgs& a) {
  with_type(a.dtype, [&](auto t) { multiply_rows<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
