// The gradients of attention from its result and lse, in one walk over the scores; see backward.h.
//
// A task is a block of queries of one sequence and KV head. It owns their dq. The tiles of dk and dv
// are sums over the blocks, which add to them in one order, the last queries first: a block waits
// before a tile until the one before it in that order has added its part. Blocks are handed out in that
// order too, KV head by KV head, so what is waited for has been begun, and mostly has ended long ago.
// So no bit depends on the number of threads. Nor does it on the other sequences: blocks and tiles are
// cut by their own tokens.
//
// The sums are floats: 8 · S · K · D bytes for each row of the batch, besides some memory of each thread.
#include <atomic>
#include <memory>
#include <thread>

#include "backward.h"
#include "../parallel.h"
#include "../scratch.h"

namespace llama_fast {
namespace ISA {
namespace bwd {

constexpr int32_t ALL = std::numeric_limits<int32_t>::max();

// Waits until `tiles` is more than i. Another thread is at it: there is not much to wait for.
static void wait_beyond(const std::atomic<int32_t>& tiles, int32_t i) {
  for (int turn = 0; tiles.load(std::memory_order_acquire) <= i; ++turn)
    if (turn > 100) std::this_thread::yield();
}

// How the sequences are cut into tasks.
struct Cut {
  int64_t K, tokens, columns;  // tokens of a block

  explicit Cut(const AttentionArgs& a)
      : K(a.K),
        tokens(std::max<int64_t>(1, block_rows(a.D) / (a.H / a.K))),
        columns(round_up(a.D, vf::W)) {}
  int64_t blocks(const Row& row) const { return (row.queries + tokens - 1) / tokens; }
  int64_t tasks(const Row& row) const { return K * blocks(row); }
  // Floats of the sums of one KV head, of dk or dv.
  int64_t sums(const Row& row) const {
    return row.queries ? round_up(row.keys, MR) * columns : 0;
  }
};

// Zeros, where no query sees a key or no key is seen.
template <class T> static void write_zeros(const AttentionBackwardArgs& a) {
  const int64_t K = a.forward.K, D = a.forward.D;
  int64_t begin = 0;  // tokens before those of the sequence
  for (Sequence of(a.forward); of.next();) {
    const AttentionArgs& its = of.args();
    const Row row(its, of.b());
    const int64_t key = a.forward.cu_seqlens ? begin : of.index * its.S;
    const int64_t unseen = row.queries ? row.keys : 0;
    std::memset(static_cast<void*>(static_cast<T*>(a.dq) + begin * its.H * D), 0,
                size_t(row.first * its.H * D) * sizeof(T));
    for (void* result : {a.dk, a.dv})
      std::memset(static_cast<void*>(static_cast<T*>(result) + (key + unseen) * K * D), 0,
                  size_t((its.S - unseen) * K * D) * sizeof(T));
    begin += its.T;
  }
}

template <class T> static void backward(const AttentionBackwardArgs& a) {
  const AttentionArgs& all = a.forward;
  write_zeros<T>(a);
  if (all.T == 0 || all.H == 0) return;
  const Cut cut(all);
  int64_t tasks = 0, sums = 0, work = 0;
  for (Sequence of(all); of.next();) {
    const Row row(of.args(), of.b());
    tasks += cut.tasks(row);
    sums += 2 * cut.K * cut.sums(row);
    work += 5 * row.queries * row.keys * all.H * all.D;
  }
  if (tasks == 0) return;
  const std::unique_ptr<float[]> memory(new float[size_t(sums)]);
  const std::unique_ptr<std::atomic<int32_t>[]> passed(new std::atomic<int32_t>[size_t(tasks)]());

  const int64_t threads = std::min(max_threads(), 1 + work / THREAD_WORK);
  parallel_tasks(tasks, threads, [&](auto next) {
    struct Work;
    const int64_t rows = std::min(cut.tokens, all.T) * (all.H / all.K);
    float* own = scratch<Work>(Memory<T>(nullptr, rows, all.D).floats);
    Sequence of(all);
    Row row(all, 0);
    int64_t begin = 0, end = 0;            // tasks of the sequence
    int64_t at = 0, sums_end = 0;          // its sums
    int64_t token = 0, token_end = 0;      // its tokens, where they are of one row
    for (int64_t task = next(); task < tasks; task = next()) {
      while (task >= end) {
        of.next();
        row = Row(of.args(), of.b());
        begin = end;
        end += cut.tasks(row);
        at = sums_end;
        sums_end += 2 * cut.K * cut.sums(row);
        token = all.cu_seqlens ? token_end : 0;
        token_end += of.args().T;
      }
      const int64_t blocks = cut.blocks(row), head = (task - begin) % cut.K;
      const int64_t rank = (task - begin) / cut.K, t = row.first + (blocks - 1 - rank) * cut.tokens;
      float* dk = memory.get() + at + 2 * head * cut.sums(row);
      const auto from_token = [&](const Heads& x) {
        return Heads{x.at<T>(0, token), x.stride};
      };
      const Block block{a, of.args(), of.b(), token, from_token(a.grad), from_token(a.o), row, head,
                        t, std::min(t + cut.tokens, of.args().T), dk, dk + cut.sums(row)};
      std::atomic<int32_t>& mine = passed[size_t(task)];
      add_block<T>(
          block, own,
          [&](int64_t i) {
            if (rank) wait_beyond(passed[size_t(task - cut.K)], int32_t(i));
          },
          [&](int64_t i) { mine.store(int32_t(i + 1), std::memory_order_release); });
      mine.store(ALL, std::memory_order_release);
    }
  });
}

}  // namespace bwd

void attention_backward(const AttentionBackwardArgs& a) {
  with_type(a.forward.dtype, [&](auto t) { bwd::backward<decltype(t)>(a); });
}

}  // namespace ISA
}  // namespace llama_fast
