// Before a process forks, the OpenMP threads of the thread that does are stopped: the child would have
// none of them, and a runtime that waits for them.
#pragma once

#if defined(_OPENMP) && defined(__linux__)
#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>
#endif

#include "cpu/threads_lost.h"

namespace llama_fast {

// From now on. The next parallel section starts threads anew, in the parent and in the child; torch's
// sections too, since it is its runtime.
inline void stop_threads_at_fork() {
#if defined(_OPENMP) && defined(__linux__)
  static bool stopped = true;
  const auto stop = [] {
    if (threads_lost) return;  // to stop them is to wait for them
    // OpenMP 5.0, and looked up here since a module that names it does not load beside an older runtime.
    using Pause = int (*)(int kind);
    static const auto pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
    constexpr int SOFT = 1;  // settings stay
    stopped = pause && pause(SOFT) == 0;
  };
  pthread_atfork(stop, nullptr, [] {
    threads_lost = threads_lost || !stopped;
    if (threads_lost) omp_set_num_threads(1);  // torch's sections, too
  });
#endif
}

}  // namespace llama_fast
