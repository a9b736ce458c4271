// How the sequences of a call, the rows of its batch or the documents packed in one, are cut into tasks.
#pragma once

#include <algorithm>
#include <cstring>

#include "../parallel.h"
#include "../scratch.h"
#include "documents.h"
#include "splits.h"

namespace llama_fast {
namespace ISA {

// A decode has a task for each KV head and split, a prefill one for each KV head and block of queries.
struct Plan {
  const AttentionArgs& a;
  int64_t G, decode_rows, partial_floats;
  int64_t threads = 1, tasks = 0;
  int64_t block = 0;        // queries of a block
  float* kept = nullptr;    // the partials of splits that wait to be merged,
  int32_t* done = nullptr;  // and how many of them are done, for each sequence and KV head

  // For queries of type T and blocks of `least` to `most` query heads. Queries without keys get their zeros.
  template <class T> Plan(const AttentionArgs& args, T, int64_t least, int64_t most)
      : a(args),
        G(a.H / a.K),
        decode_rows(std::max<int64_t>(1, std::min(DECODE_ROWS / G, a.T)) * G),
        partial_floats(Partial::floats(decode_rows, a.D)) {
    int64_t work = 0, queries = 0, waiting = 0;
    for (Sequence of(a); of.next();) {
      const AttentionArgs& its = of.args();
      const int64_t b = of.b();
      const Row row(its, b);
      std::memset(static_cast<T*>(its.o) + b * its.T * a.H * a.D, 0,
                  size_t(row.first * a.H * a.D) * sizeof(T));
      for (int64_t h = 0; its.lse && h < a.H; ++h)
        for (int64_t t = 0; t < row.first; ++t)
          write_lse<T>(its, b, t, h, -std::numeric_limits<double>::infinity());
      work += row.queries * row.keys * a.H * a.D * 2;
      queries += decodes(row) ? 0 : row.queries;
      waiting += partials(row);
    }
    threads = std::min(max_threads(), 1 + work / THREAD_WORK);
    // Four blocks a thread or more, so that they end together; the block's size changes no result.
    if (queries) {
      const int64_t rows = std::clamp<int64_t>(queries * a.H / (4 * threads), least, most);
      block = std::max<int64_t>(1, rows / G);
    }
    for (Sequence of(a); of.next();) tasks += tasks_of(Row(of.args(), of.b()));
    if (waiting) {
      struct Partials;
      const int64_t counts = sequences(a) * a.K, floats = waiting * partial_floats;
      kept = scratch<Partials>(floats + counts);
      done = reinterpret_cast<int32_t*>(kept + floats);
      std::memset(done, 0, size_t(counts) * sizeof(int32_t));
    }
  }

  bool decodes(const Row& row) const { return row.queries <= 1 || row.queries * G <= DECODE_ROWS; }
  int64_t splits(const Row& row) const { return (row.keys + SPLIT_KEYS - 1) / SPLIT_KEYS; }
  int64_t blocks(const Row& row) const { return (row.queries + block - 1) / block; }
  int64_t tasks_of(const Row& row) const {
    if (row.queries == 0) return 0;
    return a.K * (decodes(row) ? splits(row) : blocks(row));
  }
  // Splits that wait to be merged.
  int64_t partials(const Row& row) const {
    return row.queries && decodes(row) && splits(row) > 1 ? a.K * splits(row) : 0;
  }
};

// Walks through the sequences as a thread's tasks ascend.
struct Cursor {
  const Plan* plan;
  Sequence of;
  int64_t begin = 0, end = 0, partial = 0, partials = 0;
  int64_t head = 0, i = 0;  // of the task: a KV head, and which of its splits or blocks
  Row row;

  explicit Cursor(const Plan& p) : plan(&p), of(p.a), row(p.a, 0) {}
  void seek(int64_t task) {
    while (task >= end) {
      of.next();
      row = Row(of.args(), of.b());
      begin = end;
      end += plan->tasks_of(row);
      partial += partials;
      partials = plan->partials(row);
    }
    i = (task - begin) / plan->a.K;
    head = (task - begin) % plan->a.K;
  }

  // Of a block: its first query, and that behind its last. The last ones have the most keys: they go first.
  int64_t t_begin() const { return row.first + (plan->blocks(row) - 1 - i) * plan->block; }
  int64_t t_end() const { return std::min(t_begin() + plan->block, of.args().T); }

  // Of a split: its keys,
  int64_t first_key() const { return i * SPLIT_KEYS; }
  int64_t end_key() const { return std::min(first_key() + SPLIT_KEYS, row.keys); }
  // and its result, in the thread's memory where there is no other split. Partials lie as close as this
  // row needs them.
  Partial result(float* own) const {
    const int64_t rows = row.queries * plan->G, D = plan->a.D;
    return Partial(first_partial(own) + i * Partial::floats(rows, D), rows, D);
  }
  template <class T> void end_split(float* own) const {
    ISA::end_split<T>(of.args(), row, of.b(), head, first_partial(own), plan->splits(row),
                      plan->done + of.index * plan->a.K);
  }

 private:
  float* first_partial(float* own) const {
    const int64_t count = plan->splits(row);
    return count == 1 ? own : plan->kept + (partial + head * count) * plan->partial_floats;
  }
};

}  // namespace ISA
}  // namespace llama_fast
