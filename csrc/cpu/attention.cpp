// o = softmax(scale · q·kᵀ) v with an online softmax, all query heads of a KV head together. How a
// row of the batch is computed depends on that row alone: see few_queries.h and many_queries.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention/few_queries.h"
#include "attention/many_queries.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace llama_fast {
namespace ISA {

constexpr int64_t FEW_ROWS = 16;        // query heads of a KV head; packing pays beyond
constexpr int64_t PART = 1024;          // keys of a part, while
constexpr int64_t MAX_PARTS = 32;       // there are no more parts than this
constexpr int64_t THREAD_WORK = 1 << 18;  // multiply-adds that make up for waking a thread

// How the rows of the batch are cut into tasks.
struct Plan {
  const AttentionArgs& a;
  int64_t G, block;  // queries of a block, where there are many

  explicit Plan(const AttentionArgs& args) : a(args), G(args.H / args.K), block(0) {}

  bool few(const Row& row) const { return row.queries == 1 || row.queries * G <= FEW_ROWS; }
  int64_t part(const Row& row) const {
    return std::max(PART, round_up((row.keys + MAX_PARTS - 1) / MAX_PARTS, FEW_TILE));
  }
  int64_t parts(const Row& row) const { return (row.keys + part(row) - 1) / part(row); }
  int64_t tasks(const Row& row) const {
    if (row.queries == 0) return 0;
    return a.K * (few(row) ? parts(row) : (row.queries + block - 1) / block);
  }
  // Parts that wait to be combined.
  int64_t partials(const Row& row) const {
    return row.queries && few(row) && parts(row) > 1 ? a.K * parts(row) : 0;
  }
};

// Walks through the rows of the batch as a thread's tasks ascend.
struct Cursor {
  const Plan* plan;
  int64_t b = -1, begin = 0, end = 0, partial = 0, partials = 0;
  int64_t head = 0, i = 0;  // of the task: a KV head, and which of its parts or blocks
  Row row;

  explicit Cursor(const Plan& p) : plan(&p), row(p.a, 0) {}
  void seek(int64_t task) {
    while (task >= end) {
      row = Row(plan->a, ++b);
      begin = end;
      end += plan->tasks(row);
      partial += partials;
      partials = plan->partials(row);
    }
    i = (task - begin) / plan->a.K;
    head = (task - begin) % plan->a.K;
  }
  // The keys of a task of few queries.
  template <class T> Span<T> span() const {
    const int64_t size = plan->part(row);
    return {plan->a, b, head, i * size, std::min((i + 1) * size, row.keys)};
  }
};

template <class T> static void write_few(const AttentionArgs& a, const Row& row, int64_t b,
                                         int64_t head, const Partial& result) {
  const int64_t G = a.H / a.K;
  for (int64_t r = 0; r < row.queries * G; ++r) {
    write_result<T>(a, b, row.first + r / G, head * G + r % G, result.sums_of + r * result.stride,
                    result.top[r], result.total[r]);
  }
}

template <class T> static void attend(const AttentionArgs& a) {
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  Plan plan(a);
  const int64_t G = plan.G, D = a.D, few_rows = std::max<int64_t>(1, std::min(FEW_ROWS / G, a.T)) * G;

  // Sizes; and zeros for the queries without keys.
  int64_t work = 0, queries = 0, partials = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const Row row(a, b);
    std::memset(static_cast<T*>(a.o) + b * a.T * a.H * D, 0,
                size_t(row.first * a.H * D) * sizeof(T));
    for (int64_t h = 0; a.lse && h < a.H; ++h)
      for (int64_t t = 0; t < row.first; ++t)
        write_lse<T>(a, b, t, h, -std::numeric_limits<double>::infinity());
    work += row.queries * row.keys * a.H * D * 2;
    queries += plan.few(row) ? 0 : row.queries;
    partials += plan.partials(row);
  }
  const int64_t threads = std::min(max_threads(), 1 + work / THREAD_WORK);
  // Four blocks a thread or more, so that they end together; the block's size changes no result.
  const int64_t rows = std::clamp<int64_t>(queries * a.H / (4 * threads), STRIP, many_rows(D));
  plan.block = std::max<int64_t>(1, rows / G);
  int64_t tasks = 0;
  for (int64_t b = 0; b < a.B; ++b) tasks += plan.tasks(Row(a, b));

  struct Parts;
  const int64_t part_floats = Partial::floats(few_rows, D);
  float* parts = partials ? scratch<Parts>(partials * part_floats + a.B * a.K) : nullptr;
  int32_t* done = reinterpret_cast<int32_t*>(parts + partials * part_floats);
  if (partials) std::memset(done, 0, size_t(a.B * a.K) * sizeof(int32_t));

  parallel_tasks(tasks, threads, [&](auto next) {
    struct Work;
    const int64_t few = part_floats + few_floats(few_rows, D);
    const int64_t many = queries ? ManyMemory(nullptr, plan.block * G, D).floats : 0;
    float* memory = scratch<Work>(std::max(few, many));
    Cursor at(plan), following(plan);
    bool fetched = false;
    auto follow = [&](int64_t task) {
      following.seek(task);
      return plan.few(following.row) ? following.span<T>() : Span<T>();
    };
    for (int64_t task = next(), then; task < tasks; task = then) {
      at.seek(task);
      const Row& row = at.row;
      if (!plan.few(row)) {  // the last blocks have the most keys: they go first
        const int64_t blocks = (row.queries + plan.block - 1) / plan.block;
        const int64_t t = row.first + (blocks - 1 - at.i) * plan.block;
        many_queries<T>(a, row, at.b, at.head, t, std::min(t + plan.block, a.T), memory);
        then = next();
        fetched = false;
        continue;
      }
      const int64_t row_heads = row.queries * G, count = plan.parts(row);
      float* first = count == 1 ? memory : parts + (at.partial + at.head * count) * part_floats;
      // Parts lie as close as this row needs them.
      const Partial result(first + at.i * Partial::floats(row_heads, D), row_heads, D);
      few_queries<T>(
          a, row, at.b, at.head, at.span<T>(), fetched,
          [&] {
            then = next();
            return then < tasks ? follow(then) : Span<T>();
          },
          memory + part_floats, result);
      fetched = true;
      if (count > 1) {
        // Whoever finishes last sees the others' parts.
        if (__atomic_add_fetch(&done[at.b * a.K + at.head], 1, __ATOMIC_ACQ_REL) < count) continue;
        combine(first, count, row_heads, D);
      }
      write_few<T>(a, row, at.b, at.head, Partial(first, row_heads, D));
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
