// Working memory that a thread keeps from call to call, so that no call allocates twice.
#pragma once

#include <cstdint>
#include <new>

namespace llama_fast {
namespace ISA {

// At least `floats` floats, aligned to a cache line, with whatever the last user left there. Each
// type of `Use` has memory of its own.
template <class Use> static float* scratch(int64_t floats) {
  struct Memory {
    float* data = nullptr;
    int64_t size = 0;
    void release() {
      if (data) ::operator delete(data, std::align_val_t(64));
      data = nullptr;
      size = 0;
    }
    ~Memory() { release(); }
  };
  static thread_local Memory memory;
  if (memory.size < floats) {
    memory.release();
    memory.data =
        static_cast<float*>(::operator new(size_t(floats) * sizeof(float), std::align_val_t(64)));
    memory.size = floats;
  }
  return memory.data;
}

}  // namespace ISA
}  // namespace llama_fast
