// Attention against keys and values in 8 bits. A row of the batch with few queries multiplies the
// integers themselves (decode_quantized.h); for a prefill keys and values are dequantised to q's
// dtype once, for as long as the call takes, and attention does the rest. Which way a row takes
// depends on that row alone.
#include <cstring>
#include <memory>

#include "decode_quantized.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "../scratch.h"

namespace llama_fast {
namespace ISA {

void attention(const AttentionArgs&);

// The tokens [0, keys) of one row as (keys, K, D) of T.
template <class T>
static void dequantize(const Heads& x, const HeadScales& scales, int64_t b, int64_t keys, int64_t K,
                       int64_t D, T* out) {
  constexpr int W = vf::W;
  const int16_t first_only[2] = {1, 0};
  const vi one = set_words(first_only);
  parallel_for(keys, 1 + ELEMENTS_OF_A_THREAD / (K * D + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * K; n < end * K; ++n) {
      const int64_t t = n / K, h = n % K;
      const int8_t* qdata = x.at<const int8_t>(b, t) + h * x.stride.h;
      const HeadStrides& stride = scales.stride;
      const vf scale = set(scales.data[b * stride.b + t * stride.t + h * stride.h]);
      for_each_run<2 * W>(D, [&](int64_t e, auto width) {
        vi a, c;
        load_columns(qdata + e * 2 * W, qdata + e * 2 * W, a, c, width);
        vf first, second;
        order_columns(to_float(dot_words(a, one, set(0))), to_float(dot_words(c, one, set(0))),
                      first, second);
        T* to = out + n * D + e * 2 * W;
        const int64_t left = std::min<int64_t>(2 * W, D - e * 2 * W);
        store(to, first * scale, int(std::min<int64_t>(W, left)));
        if (left > W) store(to + W, second * scale, int(left - W));
      });
    }
  });
}

// One row with many queries.
template <class T>
static void prefill_quantized(const AttentionArgs& args, const Row& row, int64_t b) {
  AttentionArgs a = args;
  const int64_t size = row.keys * a.K * a.D;
  const std::unique_ptr<T[]> k(new T[size_t(size)]), v(new T[size_t(size)]);
  dequantize<T>(args.k, args.k_scales, b, row.keys, a.K, a.D, k.get());
  dequantize<T>(args.v, args.v_scales, b, row.keys, a.K, a.D, v.get());
  const HeadStrides stride{0, a.K * a.D, a.D};
  a.q.data = a.q.at<T>(b, 0);
  a.k = {k.get(), stride};
  a.v = {v.get(), stride};
  a.k_scales = a.v_scales = {};
  a.o = static_cast<T*>(a.o) + b * a.T * a.H * a.D;
  if (a.lengths) a.lengths += b;
  a.B = 1;
  a.S = row.keys;
  attention(a);
}

template <class T> static void attend_quantized(const AttentionArgs& a) {
  if (a.B == 0 || a.T == 0 || a.H == 0) return;
  const int64_t G = a.H / a.K, D = a.D;
  const auto splits = [](const Row& row) { return splits_of(row.keys); };

  // Sizes; and zeros for the queries without keys.
  int64_t work = 0, most = 0;  // of splits
  for (int64_t b = 0; b < a.B; ++b) {
    const Row row(a, b);
    if (!is_decode(row, G)) {
      prefill_quantized<T>(a, row, b);
      continue;
    }
    std::memset(static_cast<T*>(a.o) + b * a.T * a.H * D, 0,
                size_t(row.first * a.H * D) * sizeof(T));
    if (row.queries == 0) continue;
    work += row.queries * row.keys * a.H * D * 2;
    most = std::max(most, splits(row));
  }
  if (most == 0) return;

  const int64_t rows = std::max<int64_t>(1, std::min(DECODE_ROWS / G, a.T)) * G;
  const int64_t partial_floats = Partial::floats(rows, D), heads = a.B * a.K;
  struct Partials;
  float* kept = most > 1 ? scratch<Partials>(heads * most * partial_floats + heads) : nullptr;
  int32_t* done = reinterpret_cast<int32_t*>(kept + heads * most * partial_floats);
  if (most > 1) std::memset(done, 0, size_t(heads) * sizeof(int32_t));

  const int64_t tasks = a.B * most * a.K, threads = attention_threads(work);
  parallel_tasks(tasks, threads, [&](auto next) {
    struct Work;
    float* memory = scratch<Work>(partial_floats + decode_quantized_floats(rows, D));
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t b = task / (most * a.K), i = task / a.K % most, head = task % a.K;
      const Row row(a, b);
      const int64_t count = is_decode(row, G) && row.queries ? splits(row) : 0;
      if (i >= count) continue;
      const int64_t row_heads = row.queries * G, begin = i * SPLIT_KEYS;
      const int64_t end = std::min(begin + SPLIT_KEYS, row.keys);
      // Partials lie as close as this row needs them.
      float* first = count == 1 ? memory : kept + (b * a.K + head) * most * partial_floats;
      const Partial result(first + i * Partial::floats(row_heads, D), row_heads, D);
      decode_quantized<T>(a, row, b, head, begin, end, memory + partial_floats, result);
      end_split<T>(a, row, b, head, first, count, done + b * a.K);
    }
  });
}

void attention_quantized(const AttentionArgs& a) {
  with_type(a.dtype, [&](auto t) { attend_quantized<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
