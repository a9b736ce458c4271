// y = x Wᵀ for at most 16 rows of x and a weight of 8-bit or 4-bit integers. See linear/quantized.cuh.
#include "quantized.cuh"

namespace llama_fast::cuda {

void linear_quantized(const Target& target, const LinearQuantizedArgs& a) {
  launch_quantized<false>(target, "linear_quantized_fwd", a);
}

}  // namespace llama_fast::cuda
