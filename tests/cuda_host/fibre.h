// Fibres: stacks that a program switches between by itself.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Pushes what a function call must keep, leaves the stack pointer in *from, takes `to` for it.
extern "C" void cuda_host_switch(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace cuda_host {

class Fibre {
 public:
  static constexpr size_t STACK = 256 * 1024;

  Fibre() {
    void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(p);
  }
  ~Fibre() { munmap(stack_, STACK); }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next resume() calls entry(), which must end with suspend(true) and never return.
  void start(void (*entry)()) {
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(stack_ + STACK) - 1;  // entry() finds it as after a call
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;  // the six registers that are popped first
    for (int i = 0; i < 6; ++i) top[i] = nullptr;
    own_ = top;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = STACK;
    own_.uc_link = nullptr;
    makecontext(&own_, entry, 0);
#endif
#ifdef __SANITIZE_ADDRESS__
    fake_ = nullptr;
#endif
  }

  // Runs the fibre until it suspends.
  void resume() {
#ifdef __SANITIZE_ADDRESS__
    void* fake;
    __sanitizer_start_switch_fiber(&fake, stack_, STACK);
#endif
    swap(caller_, own_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // In the fibre: first thing of entry().
  void entered() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &caller_stack_, &caller_size_);
#endif
  }

  // In the fibre: back to who resumed it; for good where it has ended.
  void suspend(bool ended) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(ended ? nullptr : &fake_, caller_stack_, caller_size_);
#else
    (void)ended;
#endif
    swap(own_, caller_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_, &caller_stack_, &caller_size_);
#endif
  }

 private:
#ifdef __x86_64__
  using Context = void*;
  static void swap(Context& from, Context& to) { cuda_host_switch(&from, to); }
#else
  using Context = ucontext_t;
  static void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  char* stack_;
  Context own_, caller_;
#ifdef __SANITIZE_ADDRESS__
  void* fake_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_size_ = 0;
#endif
};

}  // namespace cuda_host
