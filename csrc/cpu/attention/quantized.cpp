// Attention against keys and values in 8 bits, which are multiplied as integers: a sum of products is
// exact, and what is left to rounding is done in one order. See decode_quantized.h and prefill_quantized.h.
#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"
#include "decode_quantized.h"
#include "plan.h"
#include "prefill_quantized.h"

namespace llama_fast {
namespace ISA {

template <class T> static void attend_quantized(const AttentionArgs& a) {
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  const Plan plan(a, T{}, STRIP / WORDS<T>, prefill_rows(a.D));

  parallel_tasks(plan.tasks, plan.threads, [&](auto next) {
    struct Work;
    const int64_t few = plan.partial_floats + decode_quantized_floats(plan.decode_rows, a.D);
    const int64_t many = QuantizedPrefillMemory<T>(nullptr, plan.block * plan.G, a.D).floats;
    float* memory = scratch<Work>(std::max(few, many));
    Cursor at(plan);
    for (int64_t task = next(); task < plan.tasks; task = next()) {
      at.seek(task);
      const AttentionArgs& its = at.of.args();
      if (!plan.decodes(at.row)) {
        prefill_quantized<T>(its, at.row, at.of.b(), at.head, at.t_begin(), at.t_end(), memory);
        continue;
      }
      decode_quantized<T>(its, at.row, at.of.b(), at.head, at.first_key(), at.end_key(),
                          memory + plan.partial_floats, at.result(memory));
      at.end_split<T>(memory);
    }
  });
}

void attention_quantized(const AttentionArgs& a) {
  with_type(a.dtype, [&](auto t) { attend_quantized<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
