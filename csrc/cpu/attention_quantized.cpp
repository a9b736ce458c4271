// Attention against keys and values in 8 bits. A row of the batch with few queries multiplies the
// codes themselves (few_queries_quantized.h); one with many has its keys and values turned into q's
// dtype once, for as long as the call takes, and attention does the rest. Which way a row takes
// depends on that row alone.
#include <cstring>
#include <memory>

#include "attention/few_queries_quantized.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace llama_fast {
namespace ISA {

void attention(const AttentionArgs&);

constexpr int64_t FEW_HEADS = 16;  // query heads of a KV head, as in attention
constexpr int64_t CODED_PART = 1024, MAX_CODED_PARTS = 32;  // keys of a part, parts of a row
constexpr int64_t CODED_WORK = 1 << 18;  // multiply-adds that make up for waking a thread

// The tokens [0, keys) of one row as (keys, K, D) of T.
template <class T>
static void dequantize(const Heads& x, const HeadScales& scales, int64_t b, int64_t keys, int64_t K,
                       int64_t D, T* out) {
  constexpr int W = vf::W;
  const int16_t first_only[2] = {1, 0};
  const vi one = set_words(first_only);
  parallel_for(keys, 1 + 16384 / (K * D + 1), [&](int64_t begin, int64_t end) {
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
static void attend_many(const AttentionArgs& args, const Row& row, int64_t b) {
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
  const auto few = [&](const Row& row) {
    return row.queries <= 1 || row.queries * G <= FEW_HEADS;
  };
  const auto part = [](const Row& row) {
    const int64_t keys = (row.keys + MAX_CODED_PARTS - 1) / MAX_CODED_PARTS;
    return std::max(CODED_PART, round_up(keys, CODED_TILE));
  };
  const auto parts = [&](const Row& row) { return (row.keys + part(row) - 1) / part(row); };

  // Sizes; and zeros for the queries without keys.
  int64_t work = 0, most = 0;  // of parts
  for (int64_t b = 0; b < a.B; ++b) {
    const Row row(a, b);
    if (!few(row)) {
      attend_many<T>(a, row, b);
      continue;
    }
    std::memset(static_cast<T*>(a.o) + b * a.T * a.H * D, 0,
                size_t(row.first * a.H * D) * sizeof(T));
    if (row.queries == 0) continue;
    work += row.queries * row.keys * a.H * D * 2;
    most = std::max(most, parts(row));
  }
  if (most == 0) return;

  const int64_t rows = std::max<int64_t>(1, std::min(FEW_HEADS / G, a.T)) * G;
  const int64_t part_floats = Partial::floats(rows, D), heads = a.B * a.K;
  struct CodedParts;
  float* kept = most > 1 ? scratch<CodedParts>(heads * most * part_floats + heads) : nullptr;
  int32_t* done = reinterpret_cast<int32_t*>(kept + heads * most * part_floats);
  if (most > 1) std::memset(done, 0, size_t(heads) * sizeof(int32_t));

  const int64_t tasks = a.B * most * a.K, threads = std::min(max_threads(), 1 + work / CODED_WORK);
  parallel_tasks(tasks, threads, [&](auto next) {
    struct CodedWork;
    float* memory = scratch<CodedWork>(part_floats + few_quantized_floats(rows, D));
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t b = task / (most * a.K), i = task / a.K % most, head = task % a.K;
      const Row row(a, b);
      const int64_t count = few(row) && row.queries ? parts(row) : 0;
      if (i >= count) continue;
      const int64_t row_heads = row.queries * G, begin = i * part(row);
      const int64_t end = std::min(begin + part(row), row.keys);
      // Parts lie as close as this row needs them.
      float* first = count == 1 ? memory : kept + (b * a.K + head) * most * part_floats;
      const Partial result(first + i * Partial::floats(row_heads, D), row_heads, D);
      few_queries_quantized<T>(a, row, b, head, begin, end, memory + part_floats, result);
      if (count > 1) {
        // Whoever finishes last sees the others' parts.
        if (__atomic_add_fetch(&done[b * a.K + head], 1, __ATOMIC_ACQ_REL) < count) continue;
        combine(first, count, row_heads, D);
      }
      const Partial all(first, row_heads, D);
      for (int64_t r = 0; r < row_heads; ++r) {
        write_result<T>(a, b, row.first + r / G, head * G + r % G, all.sums_of + r * all.stride,
                        all.top[r], all.total[r]);
      }
    }
  });
}

void attention_quantized(const AttentionArgs& a) {
  with_type(a.dtype, [&](auto t) { attend_quantized<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
