#pragma once

namespace llama_fast {

// Whether this process is a fork whose parent could not stop its threads first: see bindings/fork.h. A
// parallel section would wait for them for ever, so all work stays on the calling thread, whatever
// number of threads is set.
inline bool threads_lost = false;

}  // namespace llama_fast
