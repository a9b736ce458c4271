// h = swiglu(x W_gateᵀ, x W_upᵀ) for at most 16 rows of x and a weight of bfloat16 or float16: decoding
// in one launch. See linear/gemv.cuh.
#include "dense.cuh"

namespace llama_fast::cuda {

void linear_swiglu(const Target& target, const LinearArgs& a) {
  launch_dense<true>(target, "linear_swiglu_fwd", a);
}

}  // namespace llama_fast::cuda
