// Finds shared-memory accesses that no barrier orders; compiled in with CUDA_HOST_RACES.
//
// The kernels are then compiled with -fsanitize=thread, but linked to races.cpp in place of its
// library: the compiler calls it before every access of memory, and it keeps for each byte of the
// block's shared memory who read and wrote it last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_host::races {

// What a barrier hands on: how far into each thread's work those can see who pass it.
struct Clock { std::vector<uint32_t> seen; };

#ifdef CUDA_HOST_RACES
void start_block(const unsigned char* shared, size_t bytes, size_t threads);
void block_barrier();
void warp_barrier(int warp);
// A thread arrives at a barrier; a thread passes it.
void release(int thread, Clock& barrier);
void acquire(int thread, const Clock& barrier);
void read(const void* p, size_t bytes, int thread);
void write(const void* p, size_t bytes, int thread);
// From here to the end of the copy nobody else may touch these bytes.
void copy_begins(const void* p, size_t bytes, int thread);
void copy_ends(const void* p, size_t bytes, int thread);
// The same for a bulk copy, whose end is seen by who passes `barrier`.
void bulk_copy_ends(const void* p, size_t bytes, Clock& barrier);
// What a thread has stored is shown to the async proxy; a matrix instruction reads through it.
void fence_proxy_async(int thread);
void read_by_async_proxy(const void* p, size_t bytes, int thread);
// The first race of the block, in words, or nothing.
std::string found();
#else
inline void start_block(const unsigned char*, size_t, size_t) {}
inline void block_barrier() {}
inline void warp_barrier(int) {}
inline void release(int, Clock&) {}
inline void acquire(int, const Clock&) {}
inline void read(const void*, size_t, int) {}
inline void write(const void*, size_t, int) {}
inline void copy_begins(const void*, size_t, int) {}
inline void copy_ends(const void*, size_t, int) {}
inline void bulk_copy_ends(const void*, size_t, Clock&) {}
inline void fence_proxy_async(int) {}
inline void read_by_async_proxy(const void*, size_t, int) {}
inline std::string found() { return ""; }
#endif

}  // namespace cuda_host::races
