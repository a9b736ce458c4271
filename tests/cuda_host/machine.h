// CUDA's execution model on the host: a grid's blocks run one after another, the threads of a block
// as fibres that give way where CUDA's threads wait for each other.
//
// What a kernel cannot rely on is made as unlike what it might expect as can be: shared memory starts
// as NaN, blocks and threads run in a chosen order, and cp.async copies as late as it may. A deadlock,
// a divergent barrier or warp operation, and (with CUDA_HOST_RACES) shared-memory accesses that no
// barrier orders throw LaunchError. What works by itself beside the threads is in async.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct uint3 { unsigned x, y, z; };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

constexpr int WARP = 32, WARPGROUP = 128;

// What the running thread sees of itself.
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int number;  // in its block; its lane is number % WARP
};
extern const Thread* self;

// The shared memory of the running block; its size; and where it begins in the addresses that PTX
// instructions take, of which a GPU keeps the first ones for itself.
unsigned char* shared_bytes();
size_t shared_size();
constexpr uint32_t SHARED_WINDOW = 1024;

// Where a wait or a warp operation stands in the source: threads that meet must be at the same place.
struct Place {
  const char* what;
  const char* file;
  int line;
};

// Waits for all threads of the block that have not ended.
void block_barrier(const Place& place);

// Waits until all lanes of `mask` have come with their `args`; the last of them calls
// combine(args of each lane) for all. `orders_memory`: what the lanes did to memory before is seen
// by all of them after.
void warp_operation(const Place& place, uint32_t mask, void* args, void (*combine)(void* const*),
                    bool orders_memory);

// The same of the four warps of the running thread's warpgroup, all 128 lanes.
void warpgroup_operation(const Place& place, void* args, void (*combine)(void* const*));

// The running thread waits until `ready` says true.
void wait_until(const Place& place, std::function<bool()> ready);

// One cp.async of the running thread: copied when the thread waits for its group, not before.
void copy_later(void* shared, const void* global, int bytes, int copied);
void close_group();
void wait_for_groups(int still_open);

// Accesses of shared memory that the compiler does not see. No-ops without CUDA_HOST_RACES.
void reads(const void* p, size_t bytes, int by_thread);
void writes(void* p, size_t bytes, int by_thread);
// Matrix instructions read through the async proxy; a thread shows it what it has stored.
void reads_by_async_proxy(const void* p, size_t bytes, int by_thread);
void fence_proxy_async();

// Runs `body` once for each thread of the grid; with `overlaps`, every thread must wait for the kernel
// before.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& body, bool overlaps = false);
void waited_for_griddepcontrol();

// 0: blocks and threads in order; 1: in reverse.
extern int order;

// What gridDim.y and gridDim.z may be: 65535 on GPUs, less to see what a launch does beyond it.
extern unsigned grid_limit;

// The launches since the list was last taken, as "kernel\tblocks\tthreads\tshared bytes" lines.
std::string take_launches();

}  // namespace cuda_host
