// The sequences of a call of attention: the rows of its batch, or the documents packed in its only row.
#pragma once

#include "../../args.h"
#include "../dispatch.h"
#include "softmax.h"

namespace llama_fast {
namespace ISA {

static inline int64_t sequences(const AttentionArgs& a) { return a.cu_seqlens ? a.documents : a.B; }

// The call of document i alone: the same memory, from its first token on.
static inline AttentionArgs document_args(const AttentionArgs& a, int64_t i) {
  AttentionArgs one = a;
  const int64_t begin = a.cu_seqlens[i];
  one.T = one.S = a.cu_seqlens[i + 1] - begin;
  one.cu_seqlens = nullptr;
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (Heads* x : {&one.q, &one.k, &one.v}) x->data = x->at<T>(0, begin);
    one.o = static_cast<T*>(a.o) + begin * a.H * a.D;
    if (a.lse) one.lse = static_cast<LseOf<T>*>(a.lse) + begin;
  });
  return one;
}

// Goes from one sequence of a call to the next: args() and b() say where it is and how long.
struct Sequence {
  const AttentionArgs& all;
  int64_t index = -1;
  AttentionArgs document;

  explicit Sequence(const AttentionArgs& a) : all(a), document(a) {}
  bool next() {
    if (++index >= sequences(all)) return false;
    if (all.cu_seqlens) document = document_args(all, index);
    return true;
  }
  const AttentionArgs& args() const { return all.cu_seqlens ? document : all; }
  int64_t b() const { return all.cu_seqlens ? 0 : index; }
};

}  // namespace ISA
}  // namespace llama_fast
