// y = x Wᵀ for at most 16 rows of x and a weight of bfloat16 or float16. See linear/gemv.cuh.
#include "dense.cuh"

namespace llama_fast::cuda {

void linear(const Target& target, const LinearArgs& a) {
  launch_dense<false>(target, "linear_fwd", a);
}

}  // namespace llama_fast::cuda
