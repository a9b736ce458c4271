// RMSNorm: y = x / sqrt(mean(x²) + eps) · weight, and its gradient. See rms_norm.cuh.
#include "rms_norm.cuh"

namespace llama_fast::cuda {

void rms_norm(const Target& target, const RmsNormArgs& a) {
  launch_norm<false>(target, "rms_norm_fwd", a.dtype, a.x, nullptr, a.weight, a.y, nullptr, a.rows,
                     {}, a.C, a.eps);
}

void rms_norm_backward(const Target& target, const RmsNormBackwardArgs& a) {
  launch_norm_backward<false>(target, "rms_norm_bwd", "rms_norm_bwd_sum", a);
}

}  // namespace llama_fast::cuda
