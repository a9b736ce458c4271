// o = softmax(scale · q·kᵀ) v with an online softmax, all query heads of a KV head together. How a
// row of the batch is computed depends on that row alone: see decode.h and prefill.h. A document packed
// in a row is computed as a row that holds it alone would be.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "decode.h"
#include "documents.h"
#include "prefill.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"

namespace llama_fast {
namespace ISA {

// How the sequences are cut into tasks: the rows of the batch, or the documents packed in one row.
struct Plan {
  const AttentionArgs& a;
  int64_t G, block;  // queries of a block, where there are many

  explicit Plan(const AttentionArgs& args) : a(args), G(args.H / args.K), block(0) {}

  bool decodes(const Row& row) const { return is_decode(row, G); }
  int64_t splits(const Row& row) const { return splits_of(row.keys); }
  int64_t tasks(const Row& row) const {
    if (row.queries == 0) return 0;
    return a.K * (decodes(row) ? splits(row) : (row.queries + block - 1) / block);
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
      end += plan->tasks(row);
      partial += partials;
      partials = plan->partials(row);
    }
    i = (task - begin) / plan->a.K;
    head = (task - begin) % plan->a.K;
  }
};

template <class T> static void attend(const AttentionArgs& a) {
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  Plan plan(a);
  const int64_t G = plan.G, D = a.D, decode_rows = std::max<int64_t>(1, std::min(DECODE_ROWS / G, a.T)) * G;

  // Sizes; and zeros for the queries without keys.
  int64_t work = 0, queries = 0, partials = 0;
  for (Sequence of(a); of.next();) {
    const AttentionArgs& a = of.args();
    const int64_t b = of.b();
    const Row row(a, b);
    std::memset(static_cast<T*>(a.o) + b * a.T * a.H * D, 0,
                size_t(row.first * a.H * D) * sizeof(T));
    for (int64_t h = 0; a.lse && h < a.H; ++h)
      for (int64_t t = 0; t < row.first; ++t)
        write_lse<T>(a, b, t, h, -std::numeric_limits<double>::infinity());
    work += row.queries * row.keys * a.H * D * 2;
    queries += plan.decodes(row) ? 0 : row.queries;
    partials += plan.partials(row);
  }
  const int64_t threads = attention_threads(work);
  // Four blocks a thread or more, so that they end together; the block's size changes no result.
  const int64_t rows = std::clamp<int64_t>(queries * a.H / (4 * threads), STRIP, prefill_rows(D));
  plan.block = std::max<int64_t>(1, rows / G);
  int64_t tasks = 0;
  for (Sequence of(a); of.next();) tasks += plan.tasks(Row(of.args(), of.b()));
  const int64_t counts = sequences(a) * a.K;

  struct Partials;
  const int64_t partial_floats = Partial::floats(decode_rows, D);
  float* kept = partials ? scratch<Partials>(partials * partial_floats + counts) : nullptr;
  int32_t* done = reinterpret_cast<int32_t*>(kept + partials * partial_floats);
  if (partials) std::memset(done, 0, size_t(counts) * sizeof(int32_t));

  parallel_tasks(tasks, threads, [&](auto next) {
    struct Work;
    const int64_t few = partial_floats + Decode<T>::floats(decode_rows, D);
    const int64_t many = queries ? PrefillMemory(nullptr, plan.block * G, D).floats : 0;
    float* memory = scratch<Work>(std::max(2 * few, many));
    // Tasks of decode take turns in two places, since the next one begins before the last has ended.
    struct Place {
      Cursor at;
      std::optional<Decode<T>> task;
      float* first;  // the partials of its splits
    } places[2] = {{Cursor(plan), {}, nullptr}, {Cursor(plan), {}, nullptr}};
    auto begin_decode = [&](int i) {
      auto& [at, task, first] = places[i];
      const AttentionArgs& its = at.of.args();
      const int64_t b = at.of.b(), row_heads = at.row.queries * G, count = plan.splits(at.row);
      float* own = memory + i * few;
      first = count == 1 ? own : kept + (at.partial + at.head * count) * partial_floats;
      // Partials lie as close as this row needs them.
      const Partial result(first + at.i * Partial::floats(row_heads, D), row_heads, D);
      const int64_t begin = at.i * SPLIT_KEYS, end = std::min(begin + SPLIT_KEYS, at.row.keys);
      task.emplace(its, at.row, b, at.head, Span<T>(its, b, at.head, begin, end), own + partial_floats,
                   result);
      return &*task;
    };
    int place = 0;
    for (int64_t task = next(); task < tasks;) {
      Cursor& at = places[place].at;
      at.seek(task);
      const Row& row = at.row;
      if (!plan.decodes(row)) {  // the last blocks have the most keys: they go first
        const AttentionArgs& its = at.of.args();
        const int64_t blocks = (row.queries + plan.block - 1) / plan.block;
        const int64_t t = row.first + (blocks - 1 - at.i) * plan.block;
        prefill<T>(its, row, at.of.b(), at.head, t, std::min(t + plan.block, its.T), memory);
        task = next();
        continue;
      }
      int ending = place;
      decode<T>(
          begin_decode(place),
          [&]() -> Decode<T>* {
            task = next();
            if (task >= tasks) return nullptr;
            place ^= 1;
            places[place].at.seek(task);
            return plan.decodes(places[place].at.row) ? begin_decode(place) : nullptr;
          },
          [&](const Decode<T>&) {
            const Cursor& of = places[ending].at;
            end_split<T>(of.of.args(), of.row, of.of.b(), of.head, places[ending].first,
                         plan.splits(of.row), done + of.of.index * a.K);
            ending ^= 1;
          });
    }
  });
}

void attention_quantized(const AttentionArgs&);

void attention(const AttentionArgs& a) {
  if (a.k_scales.data) return attention_quantized(a);
  with_type(a.dtype, [&](auto t) { attend<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
