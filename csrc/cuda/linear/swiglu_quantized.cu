// h = swiglu(x W_gateᵀ, x W_upᵀ) for at most 16 rows of x and a weight of 8-bit or 4-bit integers: decoding
// in one launch. See linear/quantized.cuh.
#include "quantized.cuh"

namespace llama_fast::cuda {

void linear_swiglu_quantized(const Target& target, const LinearQuantizedArgs& a) {
  launch_quantized<true>(target, "linear_swiglu_quantized_fwd", a);
}

}  // namespace llama_fast::cuda
