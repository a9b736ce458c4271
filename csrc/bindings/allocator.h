// Large outputs in memory that is used again, as DLPack tensors.
//
// glibc maps an allocation of 32 MiB or more anew each time, and the system fills it with zeros at
// its first use: that takes as long as a memory-bound kernel. Here such memory lies in huge pages
// and is kept for the next one when its tensor goes.
#pragma once

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace llama_fast {

// Asks the system to back fresh memory by huge pages: to fault a large output in by pages of 4 kB
// takes longer than to compute it.
inline void prefer_huge_pages(uintptr_t address, uint64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t begin = (address + PAGE - 1) & ~(PAGE - 1), end = (address + bytes) & ~(PAGE - 1);
  // Where the system refuses, everything works as without.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Blocks of memory that no tensor uses, at most IDLE_BYTES of them: little enough to be held. To let
// the system take their pages (MADV_FREE) costs the next user of a block a twentieth of its time.
class Blocks {
 public:
  static constexpr size_t HUGE_PAGE = size_t(2) << 20;
  static constexpr size_t IDLE_BYTES = size_t(64) << 20;

  struct Block {
    void* data;
    size_t bytes;
  };

  // The smallest idle block of at least `bytes`, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if (it->bytes >= bytes && (best == idle_.end() || it->bytes < best->bytes)) best = it;
      if (best != idle_.end()) {
        const Block block = *best;
        idle_.erase(best);
        return block;
      }
    }
    const size_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const Block block{::operator new(rounded, std::align_val_t(HUGE_PAGE)), rounded};
    prefer_huge_pages(reinterpret_cast<uintptr_t>(block.data), block.bytes);
    return block;
  }

  // Keeps a block, and frees those that have been idle longest where there are too many bytes.
  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(block);
    free_down_to(IDLE_BYTES);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  void free_idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_down_to(0);
  }

 private:
  void free_down_to(size_t most) {
    size_t bytes = 0;
    for (const Block& block : idle_) bytes += block.bytes;
    size_t oldest = 0;
    for (; bytes > most; bytes -= idle_[oldest++].bytes)
      ::operator delete(idle_[oldest].data, std::align_val_t(HUGE_PAGE));
    idle_.erase(idle_.begin(), idle_.begin() + ptrdiff_t(oldest));
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // the oldest first
};

// Never destroyed: tensors may go when the process is about to end. No other thread holds the lock
// where the process forks: the child would wait for it for ever.
inline Blocks& blocks() {
  static Blocks* const all = [] {
#ifdef __linux__
    pthread_atfork([] { blocks().lock(); }, [] { blocks().unlock(); }, [] { blocks().unlock(); });
#endif
    return new Blocks;
  }();
  return *all;
}

// An uninitialised contiguous tensor of floats; its memory goes back to `blocks` when it goes.
class BlockTensor {
 public:
  static DLManagedTensor* make(DLDataTypeCode code, int64_t itemsize, std::vector<int64_t> shape) {
    int64_t bytes = itemsize;
    for (const int64_t n : shape) bytes *= n;
    auto* made = new BlockTensor{blocks().take(size_t(bytes)), std::move(shape), {}};
    DLTensor& tensor = made->managed_.dl_tensor;
    tensor = {made->block_.data, {kDLCPU, 0}, int32_t(made->shape_.size()),
              {code, uint8_t(8 * itemsize), 1}, made->shape_.data(), nullptr, 0};
    made->managed_.manager_ctx = made;
    made->managed_.deleter = [](DLManagedTensor* managed) {
      auto* gone = static_cast<BlockTensor*>(managed->manager_ctx);
      blocks().give(gone->block_);
      delete gone;
    };
    return &made->managed_;
  }

 private:
  BlockTensor(Blocks::Block block, std::vector<int64_t> shape, DLManagedTensor managed)
      : block_(block), shape_(std::move(shape)), managed_(managed) {}

  Blocks::Block block_;
  std::vector<int64_t> shape_;
  DLManagedTensor managed_;
};

}  // namespace llama_fast
