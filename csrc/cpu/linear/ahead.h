// Memory that will be read soon, fetched while something else is computed.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llama_fast {
namespace ISA {

// Lines of memory to fetch into L2 while something else is computed, some at each of its steps: many
// requests at once would make what follows wait.
class LinesAhead {
 public:
  LinesAhead() = default;
  // Runs of `run` lines, `stride` bytes apart, in so many steps.
  LinesAhead(const void* first, int64_t runs, int64_t run, int64_t stride, int64_t steps)
      : line_(static_cast<const char*>(first)), left_(runs * run), run_(run), of_run_(run),
        jump_(stride - (run - 1) * BYTES), each_(steps ? (left_ + steps - 1) / steps : 0) {}

  void step() {
    for (int64_t i = std::min(each_, left_); i > 0; --i) {
      __builtin_prefetch(line_, 0, 2);
      next();
    }
  }

 private:
  static constexpr int64_t BYTES = 64;  // of a line
  void next() {
    --left_;
    if (--of_run_) {
      line_ += BYTES;
    } else {
      line_ += jump_;
      of_run_ = run_;
    }
  }
  const char* line_ = nullptr;
  int64_t left_ = 0, run_ = 0, of_run_ = 0, jump_ = 0, each_ = 0;
};

}  // namespace ISA
}  // namespace llama_fast
