// What sm_90 does beside the threads of a block: barriers in shared memory, barriers of some of the
// threads, bulk copies, and products of warpgroups. Bulk copies end when no thread can go on without
// one, the oldest first, or with order = 1 the newest; products are made when their warpgroup waits for
// them, or with order = 1 when they begin.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "machine.h"

namespace cuda_host::async {

void start_block();
// Ends a copy, if one is under way.
bool end_a_copy();
// What the block has begun and not waited for, in words, or nothing.
std::string left_over();

void start_mbarrier(void* barrier, int arrivals);
void arrive(void* barrier, int expected_bytes);
void wait_for_phase(const Place& place, void* barrier, int parity);

// The running thread arrives at a barrier of `threads` threads, and with `wait` waits for the others.
void arrive_at(const Place& place, int barrier, int threads, bool wait);

// 16 bytes of a bulk copy; zeros where `from` is null.
struct Chunk {
  unsigned char* to;
  const unsigned char* from;
};
// Copies the chunks later; then `barrier` gets their bytes.
void copy_later(std::vector<Chunk> chunks, void* barrier);

// Of the running thread's warpgroup; called once for all of its threads.
void warpgroup_arrive();
// `multiply` is called once, `d` are the `count` numbers of each lane that it adds to: it gets them in a
// place of their own, and until the products have been waited for the lanes find NaN in theirs.
void product(std::vector<float*> d, int count,
             std::function<void(const std::vector<float*>& d)> multiply);
void close_group();
void wait_for_groups(int still_open);

}  // namespace cuda_host::async
