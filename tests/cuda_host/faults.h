// How the kernels with faults tell test_machine.py what was found.
#pragma once

#include <string>

#include "../../csrc/cuda/kernels.h"

inline std::string failure;

// Runs `body`; what it throws, in words, or nothing. Valid until the next call.
template <class Body> const char* caught(Body body) {
  failure.clear();
  try {
    body();
  } catch (const llama_fast::cuda::LaunchError& error) {
    failure = error.what();
  }
  return failure.c_str();
}
