// See races.h. Two accesses of a byte by different threads, one of them a write, must have a
// __syncthreads between them, or a __syncwarp if both threads are of one warp.
#ifdef CUDA_HOST_RACES
#include "races.h"

#include <cstdint>
#include <vector>

#include "machine.h"

namespace cuda_host::races {
namespace {

// When an access happened: how many barriers of the block and of its warp came before.
struct Access {
  int thread = -1;
  uint32_t block = 0, warp = 0;
};

struct Byte {
  Access write;
  Access reads[2];  // of two different threads, the last one first
  int copy = -1;    // the thread whose cp.async to this byte is under way
};

const unsigned char* base = nullptr;
std::vector<Byte> bytes_;
uint32_t block_barriers = 0;
std::vector<uint32_t> warp_barriers;
std::string race;

bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block < now.block) return true;
  return before.thread / WARP == now.thread / WARP && before.warp < now.warp;
}

void report(const char* what, size_t at, int thread, const char* other, int by) {
  if (!race.empty()) return;
  race = std::string("a race: thread ") + std::to_string(thread) + " " + what +
         " byte " + std::to_string(at) + " of shared memory, which thread " + std::to_string(by) +
         " " + other + " with no barrier between";
}

template <class Each> void for_bytes(const void* p, size_t count, Each each) {
  const size_t at = static_cast<const unsigned char*>(p) - base;  // huge where p is elsewhere
  if (at >= bytes_.size()) return;
  for (size_t i = at; i < at + count && i < bytes_.size(); ++i) each(bytes_[i], i);
}

Access access(int thread) { return {thread, block_barriers, warp_barriers[thread / WARP]}; }

}  // namespace

void start_block(const unsigned char* shared, size_t bytes, size_t threads) {
  base = shared;
  bytes_.assign(bytes, {});
  block_barriers = 0;
  warp_barriers.assign((threads + WARP - 1) / WARP, 0);
  race.clear();
}

void block_barrier() { ++block_barriers; }
void warp_barrier(int warp) { ++warp_barriers[warp]; }

void read(const void* p, size_t count, int thread) {
  const Access now = access(thread);
  for_bytes(p, count, [&](Byte& byte, size_t at) {
    if (byte.copy >= 0) report("reads", at, thread, "is copying to", byte.copy);
    if (!ordered(byte.write, now)) report("reads", at, thread, "wrote", byte.write.thread);
    if (byte.reads[0].thread != thread) byte.reads[1] = byte.reads[0];
    byte.reads[0] = now;
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
