// From a DType known at run time to a storage type known to the compiler.
#pragma once

#include "../args.h"
#include "simd/half.h"

namespace llama_fast {
namespace ISA {

// Calls f(T{}) with T the storage type: float, bf16 or f16.
template <class F> static inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

}  // namespace ISA
}  // namespace llama_fast
