// o = softmax(scale · q·kᵀ) v with an online softmax, all query heads of a KV head together. A query's
// result depends on that query and the keys that it sees alone, not on those that are computed beside it:
// see softmax.h and splits.h. So do those of the documents packed in a row.
#include <optional>

#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"
#include "decode.h"
#include "plan.h"
#include "prefill.h"

namespace llama_fast {
namespace ISA {

template <class T> static void attend(const AttentionArgs& a) {
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  const Plan plan(a, T{}, STRIP, prefill_rows(a.D));

  parallel_tasks(plan.tasks, plan.threads, [&](auto next) {
    struct Work;
#ifdef ISA_HAS_TILES
    std::optional<TileRegisters> registers;
    if (BY_TILES<T>) registers.emplace();
#endif
    const int64_t few = plan.partial_floats + Decode<T>::floats(plan.decode_rows, a.D);
    const bool all_by_tiles = BY_TILES<T> && a.batch_invariant;
    const int64_t many_rows = std::max(plan.block * plan.G, all_by_tiles ? plan.decode_rows : 0);
    const int64_t many = plan.partial_floats + PrefillMemory(nullptr, many_rows, a.D).floats;
    float* memory = scratch<Work>(std::max(2 * few, many));
    // Tasks of decode take turns in two places, since one begins before the last has ended.
    Cursor at[2] = {Cursor(plan), Cursor(plan)};
    std::optional<Decode<T>> places[2];
    int place = 0;
    auto begin_decode = [&] {
      const Cursor& of = at[place];
      const AttentionArgs& its = of.of.args();
      float* own = memory + place * few;
      const Span<T> keys(its, of.of.b(), of.head, of.first_key(), of.end_key());
      places[place].emplace(its, of.row, of.of.b(), of.head, keys, own + plan.partial_floats,
                            of.result(own));
      return &*places[place];
    };
    for (int64_t task = next(); task < plan.tasks;) {
      const Cursor& now = at[place];
      at[place].seek(task);
      if (!plan.decodes(now.row)) {
        prefill<T>(now.of.args(), now.row, now.of.b(), now.head, now.t_begin(), now.t_end(), 0,
                   now.row.keys, memory, nullptr);
        task = next();
        continue;
      }
      // Tile registers add in another order than decode.h, which is faster.
      if (all_by_tiles) {
        const Partial result = now.result(memory);
        prefill<T>(now.of.args(), now.row, now.of.b(), now.head, now.row.first, now.of.args().T,
                   now.first_key(), now.end_key(), memory + plan.partial_floats, &result);
        now.template end_split<T>(memory);
        task = next();
        continue;
      }
      int ending = place;
      decode<T>(
          begin_decode(),
          [&]() -> Decode<T>* {
            task = next();
            if (task >= plan.tasks) return nullptr;
            place ^= 1;
            at[place].seek(task);
            return plan.decodes(at[place].row) ? begin_decode() : nullptr;
          },
          [&](const Decode<T>&) {
            at[ending].template end_split<T>(memory + ending * few);
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
