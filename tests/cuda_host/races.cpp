// See races.h. Two accesses of a byte by different threads, one of them a write, must be ordered: by a
// __syncthreads between them, by a __syncwarp if both threads are of one warp, or by barriers on which
// one thread has arrived, directly or by way of others, and which the other has passed.
//
// Vector clocks say so: each thread counts what it hands on to barriers, and knows of every other thread
// how far it can see into that one's work. __syncthreads is counted apart, since it orders everything.
#ifdef CUDA_HOST_RACES
#include "races.h"

#include <algorithm>

#include "machine.h"

namespace cuda_host::races {
namespace {

// When an access happened: how many barriers of the block came before, and the thread's own count.
struct Access {
  int thread = -1;
  uint32_t block = 0, clock = 0;
};

struct Byte {
  uint32_t generation = 0;  // of an earlier block: as if never touched
  int copy = -1;            // the thread whose copy to this byte is under way
  uint32_t shown = 0;       // how often the writer had shown its stores to the async proxy
  Access write;
  Access reads[8];  // of different threads, the last one first
};

const unsigned char* base = nullptr;
std::vector<Byte> bytes_;
size_t size = 0;
uint32_t generation = 0, block_barriers = 0;
// Row t: what thread t sees of each thread and, behind them, of the bulk copies; empty: nothing.
std::vector<std::vector<uint32_t>> seen_by;
std::vector<uint32_t> shown_by;
uint32_t bulk_copies = 0;
std::string race;

int threads() { return static_cast<int>(seen_by.size()); }

std::vector<uint32_t>& row(int thread) {
  auto& own = seen_by[thread];
  if (own.empty()) {
    own.assign(seen_by.size() + 1, 0);
    own[thread] = 1;
  }
  return own;
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  into.resize(seen_by.size() + 1);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block < now.block) return true;
  const auto& sees = seen_by[now.thread];
  return !sees.empty() && sees[before.thread] >= before.clock;
}

std::string name_of(int thread) {
  return thread == threads() ? "a bulk copy" : "thread " + std::to_string(thread);
}

void report(const char* what, size_t at, int thread, const char* other, int by,
            const char* missing = " with no barrier between") {
  if (!race.empty()) return;
  race = "a race: " + name_of(thread) + " " + what + " byte " + std::to_string(at) +
         " of shared memory, which " + name_of(by) + " " + other + missing;
}

template <class Each> void for_bytes(const void* p, size_t count, Each each) {
  const size_t at = static_cast<const unsigned char*>(p) - base;  // huge where p is elsewhere
  if (at >= size) return;
  for (size_t i = at; i < at + count && i < size; ++i) {
    if (bytes_[i].generation != generation) {
      bytes_[i] = {};
      bytes_[i].generation = generation;
    }
    each(bytes_[i], i);
  }
}

Access access(int thread) {
  const auto& own = seen_by[thread];
  return {thread, block_barriers, own.empty() ? 1 : own[thread]};
}

}  // namespace

void start_block(const unsigned char* shared, size_t bytes, size_t threads) {
  base = shared;
  size = bytes;
  if (bytes_.size() < bytes) bytes_.resize(bytes);
  ++generation;
  block_barriers = bulk_copies = 0;
  seen_by.resize(threads);
  for (auto& own : seen_by) own.clear();
  shown_by.assign(threads, 0);
  race.clear();
}

void block_barrier() { ++block_barriers; }

void warp_barrier(int warp) {
  Clock all;
  const int end = std::min((warp + 1) * WARP, threads());
  for (int t = warp * WARP; t < end; ++t) release(t, all);
  for (int t = warp * WARP; t < end; ++t) acquire(t, all);
}

void release(int thread, Clock& barrier) {
  join(barrier.seen, row(thread));
  ++row(thread)[thread];
}

void acquire(int thread, const Clock& barrier) { join(row(thread), barrier.seen); }

void read(const void* p, size_t count, int thread) {
  const Access now = access(thread);
  for_bytes(p, count, [&](Byte& byte, size_t at) {
    if (byte.copy >= 0) report("reads", at, thread, "is copying to", byte.copy);
    if (!ordered(byte.write, now)) report("reads", at, thread, "wrote", byte.write.thread);
    // A read that this one comes after needs no keeping: who is ordered after this is after both.
    auto* const reads = byte.reads;
    int old = 0;
    while (old < 7 && reads[old].thread != thread && !ordered(reads[old], now)) ++old;
    for (; old > 0; --old) reads[old] = reads[old - 1];
    reads[0] = now;
  });
}

void write(const void* p, size_t count, int thread) {
  const Access now = access(thread);
  for_bytes(p, count, [&](Byte& byte, size_t at) {
    if (byte.copy >= 0 && byte.copy != thread)
      report("writes", at, thread, "is copying to", byte.copy);
    if (!ordered(byte.write, now)) report("writes", at, thread, "wrote", byte.write.thread);
    for (const Access& read : byte.reads)
      if (!ordered(read, now)) report("writes", at, thread, "read", read.thread);
    byte.write = now;
    byte.shown = shown_by[thread];
  });
}

void copy_begins(const void* p, size_t count, int thread) {
  write(p, count, thread);
  for_bytes(p, count, [&](Byte& byte, size_t) { byte.copy = thread; });
}

void copy_ends(const void* p, size_t count, int thread) {
  for_bytes(p, count, [&](Byte& byte, size_t) { byte.copy = -1; });
  write(p, count, thread);
}

void bulk_copy_ends(const void* p, size_t count, Clock& barrier) {
  const Access now{threads(), block_barriers, ++bulk_copies};
  for_bytes(p, count, [&](Byte& byte, size_t) {
    byte.copy = -1;
    byte.write = now;
  });
  join(barrier.seen, {});
  barrier.seen[threads()] = bulk_copies;
}

void fence_proxy_async(int thread) { ++shown_by[thread]; }

void read_by_async_proxy(const void* p, size_t count, int thread) {
  read(p, count, thread);
  for_bytes(p, count, [&](Byte& byte, size_t at) {
    const int writer = byte.write.thread;
    if (writer >= 0 && writer < threads() && byte.shown == shown_by[writer])
      report("multiplies", at, thread, "wrote", writer, " and has not shown to the async proxy");
  });
}

std::string found() { return race; }

}  // namespace cuda_host::races

// What g++ -fsanitize=thread calls.
using namespace cuda_host;

static void seen(const void* p, size_t bytes, bool write) {
  if (!self) return;
  if (write) races::write(p, bytes, self->number);
  else races::read(p, bytes, self->number);
}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESSES(BYTES)                                                     \
  void __tsan_read##BYTES(void* p) { seen(p, BYTES, false); }               \
  void __tsan_write##BYTES(void* p) { seen(p, BYTES, true); }               \
  void __tsan_unaligned_read##BYTES(void* p) { seen(p, BYTES, false); }     \
  void __tsan_unaligned_write##BYTES(void* p) { seen(p, BYTES, true); }     \
  void __tsan_volatile_read##BYTES(void* p) { seen(p, BYTES, false); }      \
  void __tsan_volatile_write##BYTES(void* p) { seen(p, BYTES, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long bytes) { seen(p, bytes, false); }
void __tsan_write_range(void* p, unsigned long bytes) { seen(p, bytes, true); }
int __tsan_atomic32_fetch_add(volatile int* p, int x, int) {
  const int before = *p;
  *p = before + x;
  return before;
}
}
#endif
