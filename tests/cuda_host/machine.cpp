// See machine.h.
#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "async.h"
#include "fibre.h"
#include "races.h"

#ifdef __x86_64__
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif

namespace cuda_host {

const Thread* self = nullptr;
int order = 0;
unsigned grid_limit = 65535;

namespace {

struct Copy {
  void* shared;
  const void* global;
  int bytes, copied;
};

struct Lane : Thread {
  enum State { READY, AT_BARRIER, TOGETHER, WAITING, ENDED } state;
  Place place;
  uint32_t mask;
  int count;  // of the lanes that come together, a warp's or a warpgroup's
  void* args;
  std::function<bool()> ready;
  bool waited;  // for the kernel before
  std::vector<Copy> open;                 // copies of no group yet
  std::vector<std::vector<Copy>> groups;  // those not yet waited for, oldest first
};

// Of the launch that is under way; blocks run one at a time.
std::string kernel, failure, launches;
std::vector<Lane> lanes;
std::vector<std::unique_ptr<Fibre>> fibres;
unsigned char* shared_base = nullptr;
size_t shared_count = 0;
const std::function<void()>* thread_body = nullptr;
int running = 0;
bool must_wait = false;

std::string where(const Place& place) {
  return std::string(place.what) + " (" + place.file + ":" + std::to_string(place.line) + ")";
}

std::string name_of(int thread) { return "thread " + std::to_string(thread); }

bool same(const Place& a, const Place& b) {
  return a.line == b.line && !std::strcmp(a.what, b.what) && !std::strcmp(a.file, b.file);
}

void give_way() {
  fibres[running]->suspend(false);
}

// A thread that has failed never goes on; the launch then throws.
void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  lanes[running].state = Lane::ENDED;
  fibres[running]->suspend(true);
}

void entry() {
  fibres[running]->entered();
  try {
    (*thread_body)();
    if (!lanes[running].open.empty() || !lanes[running].groups.empty())
      fail(name_of(running) + " ends with cp.async copies that it has not waited for");
    if (must_wait && !lanes[running].waited)
      fail(name_of(running) + " ends and has not waited for the kernel before");
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
  lanes[running].state = Lane::ENDED;
  fibres[running]->suspend(true);
}

// Lets the threads at the barrier go on when all that have not ended are there.
bool open_barrier() {
  const Lane* first = nullptr;
  for (const Lane& lane : lanes) {
    if (lane.state == Lane::ENDED) continue;
    if (lane.state != Lane::AT_BARRIER) return false;
    if (!first) first = &lane;
    if (!same(first->place, lane.place)) {
      failure = name_of(first->number) + " waits at " + where(first->place) + " and " +
                name_of(lane.number) + " at " + where(lane.place);
      return false;
    }
  }
  if (!first) return false;
  for (Lane& lane : lanes)
    if (lane.state == Lane::AT_BARRIER) lane.state = Lane::READY;
  races::block_barrier();
  return true;
}

bool all_ended() {
  return std::all_of(lanes.begin(), lanes.end(),
                     [](const Lane& lane) { return lane.state == Lane::ENDED; });
}

void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    lanes[i].state = Lane::READY;
    lanes[i].waited = false;
    lanes[i].open.clear();
    lanes[i].groups.clear();
    fibres[i]->start(entry);
  }
  races::start_block(shared_base, shared_count, threads);
  async::start_block();
  do {
    for (bool progress = true; progress && failure.empty();) {
      progress = false;
      for (size_t i = 0; i < threads && failure.empty(); ++i) {
        const size_t next = order == 0 ? i : threads - 1 - i;
        Lane& lane = lanes[next];
        if (lane.state == Lane::WAITING && lane.ready()) lane.state = Lane::READY;
        if (lane.state != Lane::READY) continue;
        progress = true;
        running = static_cast<int>(next);
        self = &lane;
        fibres[next]->resume();
      }
    }
    // A copy that outlives the block's threads is one that nobody has waited for.
  } while (failure.empty() && (open_barrier() || (!all_ended() && async::end_a_copy())));
  for (const Lane& lane : lanes) {
    if (!failure.empty()) break;
    if (lane.state != Lane::ENDED)
      failure = name_of(lane.number) + " waits for ever at " + where(lane.place);
  }
}

}  // namespace

unsigned char* shared_bytes() { return shared_base; }
size_t shared_size() { return shared_count; }

void block_barrier(const Place& place) {
  Lane& lane = lanes[running];
  lane.place = place;
  lane.state = Lane::AT_BARRIER;
  give_way();
}

// Waits until the lanes of `mask` among the `count` from `first` on have come to this place.
static void come_together(const Place& place, int first, int count, uint32_t mask, void* args,
                          void (*combine)(void* const*), bool orders_memory) {
  const auto taken = [&](int i) { return count > WARP || mask >> i & 1; };
  Lane& lane = lanes[running];
  lane.place = place;
  lane.mask = mask;
  lane.count = count;
  lane.args = args;
  lane.state = Lane::TOGETHER;
  void* all[WARPGROUP] = {};
  bool complete = true;
  for (int i = 0; i < count; ++i) {
    if (!taken(i)) continue;
    if (first + i >= static_cast<int>(lanes.size()) || lanes[first + i].state == Lane::ENDED) {
      fail(where(place) + ": it waits for " + name_of(first + i) + ", which has ended");
    }
    const Lane& other = lanes[first + i];
    // Another warp may still be at an operation of its own.
    const bool own_warp = other.number / WARP == lane.number / WARP;
    if (other.state != Lane::TOGETHER || (other.count < count && !own_warp)) {
      complete = false;
    } else if (!same(other.place, place) || other.mask != mask) {
      fail(name_of(lane.number) + " is at " + where(place) + " and " + name_of(other.number) +
           " at " + where(other.place) + ", or with another mask");
    }
    all[i] = other.args;
  }
  if (!complete) return give_way();
  if (combine) combine(all);
  for (int i = 0; i < count; ++i)
    if (taken(i)) lanes[first + i].state = Lane::READY;
  if (orders_memory) races::warp_barrier(first / WARP);
}

void warp_operation(const Place& place, uint32_t mask, void* args, void (*combine)(void* const*),
                    bool orders_memory) {
  const int number = lanes[running].number, first = number / WARP * WARP;
  if (!(mask >> (number - first) & 1))
    fail(where(place) + ": " + name_of(number) + " is not in its own mask");
  come_together(place, first, WARP, mask, args, combine, orders_memory);
}

void warpgroup_operation(const Place& place, void* args, void (*combine)(void* const*)) {
  const int first = lanes[running].number / WARPGROUP * WARPGROUP;
  come_together(place, first, WARPGROUP, 0xffffffffu, args, combine, false);
}

void wait_until(const Place& place, std::function<bool()> ready) {
  Lane& lane = lanes[running];
  while (!ready()) {
    lane.place = place;
    lane.ready = ready;
    lane.state = Lane::WAITING;
    give_way();
  }
}

void copy_later(void* shared, const void* global, int bytes, int copied) {
  races::copy_begins(shared, bytes, running);
  lanes[running].open.push_back({shared, global, bytes, copied});
}

void close_group() {
  Lane& lane = lanes[running];
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
}

void wait_for_groups(int still_open) {
  auto& groups = lanes[running].groups;
  while (static_cast<int>(groups.size()) > still_open) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.shared, copy.global, copy.copied);
      std::memset(static_cast<char*>(copy.shared) + copy.copied, 0, copy.bytes - copy.copied);
      races::copy_ends(copy.shared, copy.bytes, running);
    }
    groups.erase(groups.begin());
  }
}

void reads(const void* p, size_t bytes, int by_thread) { races::read(p, bytes, by_thread); }
void writes(void* p, size_t bytes, int by_thread) { races::write(p, bytes, by_thread); }
void reads_by_async_proxy(const void* p, size_t bytes, int by_thread) {
  races::read_by_async_proxy(p, bytes, by_thread);
}
void fence_proxy_async() { races::fence_proxy_async(running); }

void waited_for_griddepcontrol() { lanes[running].waited = true; }

void run(const char* name, dim3 grid, dim3 block, size_t bytes, const std::function<void()>& body,
         bool overlaps) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  kernel = name;
  failure.clear();
  launches += kernel + "\t" + std::to_string(size_t(grid.x) * grid.y * grid.z) + "\t" +
              std::to_string(threads) + "\t" + std::to_string(bytes) + "\n";
  const auto refuse = [&](const std::string& why) {
    throw llama_fast::cuda::LaunchError("kernel " + kernel + ": " + why);
  };
  if (threads == 0 || threads > 1024) refuse(std::to_string(threads) + " threads to a block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > grid_limit || grid.z > grid_limit)
    refuse("a grid that no GPU takes");
  thread_body = &body;
  must_wait = overlaps;
  lanes.assign(threads, {});
  while (fibres.size() < threads) fibres.push_back(std::make_unique<Fibre>());
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t b = order == 0 ? i : blocks - 1 - i;
    // Fresh and exactly as large as asked, so that AddressSanitizer sees an access beyond it.
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 1024, bytes ? bytes : 1)) throw std::bad_alloc();
    const std::unique_ptr<void, decltype(&std::free)> shared(fresh, std::free);
    std::memset(fresh, 0xff, bytes);  // NaN in every float type
    shared_base = static_cast<unsigned char*>(fresh);
    shared_count = bytes;
    for (size_t t = 0; t < threads; ++t) {
      Lane& lane = lanes[t];
      lane.number = static_cast<int>(t);
      lane.thread_index = {unsigned(t % block.x), unsigned(t / block.x % block.y),
                           unsigned(t / block.x / block.y)};
      lane.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                          unsigned(b / grid.x / grid.y)};
      lane.block_size = block;
      lane.grid_size = grid;
    }
    run_block(threads);
    self = nullptr;
    if (failure.empty()) failure = races::found();
    if (failure.empty()) failure = async::left_over();
    if (!failure.empty()) refuse("block " + std::to_string(b) + ": " + failure);
  }
}

std::string take_launches() {
  std::string taken;
  taken.swap(launches);
  return taken;
}

}  // namespace cuda_host
