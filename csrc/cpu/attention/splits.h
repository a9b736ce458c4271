// KV splits: the keys of a row, cut at multiples of SPLIT_KEYS, and what is known of its queries after each.
//
// A query's softmax begins anew at each split, and the splits are merged one after another, in
// ascending order. Decode computes them as tasks of their own, a prefill in one task: the sums of a
// query are the same, and depend on the keys that it sees alone.
#pragma once

#include <algorithm>

#include "../kernel_choice.h"
#include "softmax.h"

namespace llama_fast {
namespace ISA {

static_assert(SPLIT_KEYS % TILE == 0);

// What is known of some queries after a KV split: sums (rows, stride), and of each query the largest
// exponent m and the sum l of the weights.
struct Partial {
  float *sums_of, *m, *l;
  int64_t stride;

  static int64_t stride_for(int64_t D) { return round_up(D, 2 * vf::W); }
  static int64_t floats(int64_t rows, int64_t D) {
    return round_up(rows * (stride_for(D) + 2), 16);  // whole lines of the caches
  }
  Partial(float* memory, int64_t rows, int64_t D)
      : sums_of(memory),
        m(memory + rows * stride_for(D)),
        l(m + rows),
        stride(stride_for(D)) {}
};

// Merges a query's next split, with sums `from`, into those of the splits before it.
static inline void merge_state(float* sums_of, float& m, float& l, const float* from, float from_m,
                               float from_l, int64_t D, const ScoreScale& scale) {
  if (from_l == 0.f) return;  // all its keys lie behind this query
  const float largest = std::max(m, from_m), base = base_of(largest);
  const vf before = set(correction_of(m, scale, base));
  const vf factor = set(correction_of(from_m, scale, base));
  for (int64_t d = 0; d < D; d += vf::W)
    store(sums_of + d, fma(load(from + d), factor, load(sums_of + d) * before));
  l = first_lane(fma(set(from_l), factor, set(l) * before));
  m = largest;
}

// Ends one of `count` splits of a row and a KV head, whose partials begin at `first`: the last of them
// merges all and writes the result. `done` counts them, for each KV head of the row.
template <class T>
static void end_split(const AttentionArgs& a, const Row& row, int64_t b, int64_t head, float* first,
                      int64_t count, int32_t* done) {
  const int64_t G = a.H / a.K, rows = row.queries * G;
  // Whoever finishes last sees the others' partials.
  if (count > 1 && __atomic_add_fetch(&done[head], 1, __ATOMIC_ACQ_REL) < count) return;
  const Partial result(first, rows, a.D);
  for (int64_t r = 0; r < rows; ++r) {
    float* sums_of = result.sums_of + r * result.stride;
    for (int64_t i = 1; i < count; ++i) {
      const Partial split(first + i * Partial::floats(rows, a.D), rows, a.D);
      merge_state(sums_of, result.m[r], result.l[r], split.sums_of + r * split.stride, split.m[r],
                  split.l[r], a.D, a.scale);
    }
    write_result<T>(a, b, row.first + r / G, head * G + r % G, sums_of, result.m[r], result.l[r]);
  }
}

}  // namespace ISA
}  // namespace llama_fast
