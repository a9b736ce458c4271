// See async.h.
#include "async.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>

#include "../../csrc/cuda/kernels.h"
#include "races.h"

namespace cuda_host::async {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw llama_fast::cuda::LaunchError(what);
}

struct Mbarrier {
  int arrivals, pending;
  int64_t bytes = 0;  // expected, and not here yet
  int phase = 0;
  races::Clock arrived, passed;  // of this phase so far; of all that are over
};

struct Meeting {
  int threads = 0, arrived = 0, round = 0;
  races::Clock clock;
  std::vector<races::Clock> passed;  // of each round
};

struct Copy {
  std::vector<Chunk> chunks;
  void* barrier;
};

struct Product {
  std::vector<float*> d;
  int count;
  std::function<void(const std::vector<float*>&)> multiply;
};

// The registers of a product under way: those of the lanes hold NaN meanwhile.
struct Registers {
  std::vector<float*> lanes;
  std::vector<std::vector<float>> values;
  int products = 0;  // not made yet, or not waited for
};

struct Warpgroup {
  bool begun = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<float*, Registers> registers;  // by the first lane's
};

std::map<void*, Mbarrier> mbarriers;
std::map<int, Meeting> meetings;
std::deque<Copy> copies;
std::map<int, Warpgroup> warpgroups;

Mbarrier& at(void* barrier) {
  const auto found = mbarriers.find(barrier);
  require(found != mbarriers.end(), "an mbarrier is used that has not been started");
  return found->second;
}

void end_phase_if_complete(Mbarrier& b) {
  if (b.pending > 0 || b.bytes > 0) return;
  b.pending = b.arrivals;
  ++b.phase;
  b.passed = b.arrived;  // of the phases before too: their clocks are never taken back
}

Warpgroup& own_warpgroup() { return warpgroups[self->number / WARPGROUP]; }

std::vector<float*> pointers(std::vector<std::vector<float>>& values) {
  std::vector<float*> p;
  for (auto& lane : values) p.push_back(lane.data());
  return p;
}

void make(Warpgroup& w, const Product& product) {
  product.multiply(pointers(w.registers.at(product.d[0]).values));
}

}  // namespace

void start_block() {
  mbarriers.clear();
  meetings.clear();
  copies.clear();
  warpgroups.clear();
}

bool end_a_copy() {
  if (copies.empty()) return false;
  const Copy copy = order == 0 ? copies.front() : copies.back();
  if (order == 0) copies.pop_front();
  else copies.pop_back();
  Mbarrier& barrier = mbarriers.at(copy.barrier);
  for (const Chunk& chunk : copy.chunks) {
    if (chunk.from) std::memcpy(chunk.to, chunk.from, 16);
    else std::memset(chunk.to, 0, 16);
    races::bulk_copy_ends(chunk.to, 16, barrier.arrived);
  }
  barrier.bytes -= 16 * int64_t(copy.chunks.size());
  end_phase_if_complete(barrier);
  return true;
}

std::string left_over() {
  for (const auto& [id, meeting] : meetings)
    if (meeting.arrived > 0)
      return "the block ends with arrivals at barrier " + std::to_string(id) +
             " that nobody has waited for";
  for (const auto& [number, w] : warpgroups)
    if (!w.open.empty() || !w.groups.empty())
      return "warpgroup " + std::to_string(number) +
             " ends with products that it has not waited for";
  return copies.empty() ? "" : "the block ends with bulk copies that it has not waited for";
}

void start_mbarrier(void* barrier, int arrivals) {
  require(reinterpret_cast<uintptr_t>(barrier) % 8 == 0, "an mbarrier is not aligned to 8 bytes");
  require(!mbarriers.count(barrier), "an mbarrier is started twice");
  mbarriers[barrier] = {arrivals, arrivals};
  writes(barrier, 8, self->number);
}

void arrive(void* barrier, int expected_bytes) {
  reads(barrier, 8, self->number);  // whoever comes here must see that it has been started
  Mbarrier& b = at(barrier);
  require(b.pending > 0, "more arrivals at an mbarrier than it was started for");
  races::release(self->number, b.arrived);
  b.bytes += expected_bytes;
  --b.pending;
  end_phase_if_complete(b);
}

void wait_for_phase(const Place& place, void* barrier, int parity) {
  reads(barrier, 8, self->number);
  at(barrier);
  wait_until(place, [=] { return (at(barrier).phase & 1) != parity; });
  races::acquire(self->number, at(barrier).passed);
}

void arrive_at(const Place& place, int barrier, int threads, bool wait) {
  require(barrier > 0 && barrier < 16, "barriers of some threads have the numbers 1 to 15");
  require(threads % WARP == 0, "a barrier of some threads counts whole warps");
  Meeting& meeting = meetings[barrier];
  require(meeting.arrived == 0 || meeting.threads == threads,
          "a barrier is given different numbers of threads");
  meeting.threads = threads;
  races::release(self->number, meeting.clock);
  const size_t round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.passed.push_back(meeting.clock);
    meeting.arrived = 0;
    ++meeting.round;
  }
  if (!wait) return;
  wait_until(place, [=] { return meetings[barrier].passed.size() > round; });
  races::acquire(self->number, meetings[barrier].passed[round]);
}

void copy_later(std::vector<Chunk> chunks, void* barrier) {
  reads(barrier, 8, self->number);
  at(barrier);
  for (const Chunk& chunk : chunks) {
    require(chunk.to >= shared_bytes() && chunk.to + 16 <= shared_bytes() + shared_size(),
            "a bulk copy goes beyond the shared memory");
    races::copy_begins(chunk.to, 16, self->number);
  }
  copies.push_back({std::move(chunks), barrier});
}

void warpgroup_arrive() { own_warpgroup().begun = true; }

void product(std::vector<float*> d, int count,
             std::function<void(const std::vector<float*>&)> multiply) {
  Warpgroup& w = own_warpgroup();
  require(w.begun, "wgmma without wgmma.fence since the registers were the threads' own");
  Registers& registers = w.registers[d[0]];
  if (registers.products++ == 0) {
    registers.lanes = d;
    for (float* lane : d) {
      registers.values.emplace_back(lane, lane + count);
      std::fill(lane, lane + count, NAN);
    }
  }
  w.open.push_back({std::move(d), count, std::move(multiply)});
  if (order == 1) make(w, w.open.back());
}

void close_group() {
  Warpgroup& w = own_warpgroup();
  w.groups.push_back(std::move(w.open));
  w.open.clear();
}

void wait_for_groups(int still_open) {
  Warpgroup& w = own_warpgroup();
  w.begun = false;
  while (static_cast<int>(w.groups.size()) > still_open) {
    for (const Product& product : w.groups.front()) {
      if (order == 0) make(w, product);
      Registers& registers = w.registers.at(product.d[0]);
      if (--registers.products > 0) continue;
      for (size_t i = 0; i < registers.lanes.size(); ++i)
        std::copy(registers.values[i].begin(), registers.values[i].end(), registers.lanes[i]);
      w.registers.erase(product.d[0]);
    }
    w.groups.pop_front();
  }
}

}  // namespace cuda_host::async
