// Splits work over torch's own threads: this module's OpenMP binds to the runtime that torch
// loaded, so torch.set_num_threads holds here too and no second pool spins.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernel_choice.h"
#include "threads_lost.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llama_fast {
namespace ISA {

// The threads that a parallel section would get here.
static inline int64_t max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() || threads_lost ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls f(begin, end) on contiguous parts of [0, n), one a thread; a part is at least `grain`
// items, so that work too small to share stays on the calling thread.
template <class F> static inline void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
#ifdef _OPENMP
  const int64_t parts = (n + grain - 1) / grain;
  const int64_t threads = max_threads();
  if (parts > 1 && threads > 1) {
#pragma omp parallel num_threads(int(parts < threads ? parts : threads))
    {
      const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
      const int64_t begin = n * me / team, end = n * (me + 1) / team;
      if (begin < end) f(begin, end);
    }
    return;
  }
#endif
  f(0, n);
}

// As parallel_for, for work that waits for memory, which one thread may be given more slowly: seven
// eighths are split evenly, and the rest is taken `piece` items at a time, so that all end together.
template <class F>
static inline void parallel_for_then_pieces(int64_t n, int64_t grain, int64_t piece, F&& f) {
  if (n <= 0) return;
#ifdef _OPENMP
  const int64_t parts = (n + grain - 1) / grain;
  const int64_t threads = max_threads();
  if (parts > 1 && threads > 1) {
    const int64_t even = n / 8 * 7;
    std::atomic<int64_t> taken{even};
#pragma omp parallel num_threads(int(parts < threads ? parts : threads))
    {
      const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
      int64_t begin = even * me / team, end = even * (me + 1) / team;
      for (; begin < n; end = begin + piece < n ? begin + piece : n) {
        if (begin < end) f(begin, end);
        begin = taken.fetch_add(piece, std::memory_order_relaxed);
      }
    }
    return;
  }
#endif
  f(0, n);
}

// The grain of a product: so many rows of the weight, of `each` multiply-adds.
static inline int64_t product_grain(int64_t rows, int64_t each) {
  return rows * each < PRODUCT_ON_ONE_THREAD ? rows : 1 + PRODUCT_SHARE / each;
}

// For tasks of unequal cost: calls f(next) once on each of at most `threads` threads; next() gives
// a thread its next task, ascending, or `n` or more when none is left.
template <class F> static inline void parallel_tasks(int64_t n, int64_t threads, F&& f) {
  std::atomic<int64_t> taken{0};
  auto next = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
#ifdef _OPENMP
  if (n > 1 && threads > 1) {
#pragma omp parallel num_threads(int(n < threads ? n : threads))
    f(next);
    return;
  }
#endif
  f(next);
}

}  // namespace ISA
}  // namespace llama_fast
