// Residual addition and RMSNorm in one: total = x + residual; y = rms_norm(total). See rms_norm.cuh.
#include "rms_norm.cuh"

namespace llama_fast::cuda {

void add_rms_norm(const Target& target, const AddRmsNormArgs& a) {
  launch_norm<true>(target, "add_rms_norm_fwd", a.dtype, a.x, a.residual, a.weight, a.y, a.total,
                    a.x_rows, a.residual_rows, a.C, a.eps);
}

void add_rms_norm_backward(const Target& target, const RmsNormBackwardArgs& a) {
  launch_norm_backward<true>(target, "add_rms_norm_bwd", "add_rms_norm_bwd_sum", a);
}

}  // namespace llama_fast::cuda
