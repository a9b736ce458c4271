// The kernels' arguments from an op's tensors, where both modules make them the same way.
#pragma once

#include <cmath>
#include <optional>

#include "tensor.h"

namespace llama_fast {

inline RmsNormArgs rms_norm_args(const Tensor& x, const Tensor& weight, double eps,
                                 const Tensor& y) {
  return {.dtype = x.dtype(),
          .x = x.data,
          .weight = weight.data,
          .y = y.data,
          .rows = rows(x),
          .C = x.size(-1),
          .eps = float(eps)};
}

inline AddRmsNormArgs add_rms_norm_args(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps, const Tensor& y,
                                        const Tensor& total) {
  return {.dtype = x.dtype(),
          .x = x.data,
          .residual = residual.data,
          .weight = weight.data,
          .y = y.data,
          .total = total.data,
          .x_rows = rows(x),
          .residual_rows = rows(residual),
          .C = x.size(-1),
          .eps = float(eps)};
}

// x is what was normalised; dw_partials (partials, C) is scratch.
inline RmsNormBackwardArgs norm_backward_args(const Tensor& grad, const OptionalTensor& grad_total,
                                              const Tensor& x, const Tensor& weight, double eps,
                                              const Tensor& dw_partials, const Tensor& dx,
                                              const Tensor& dw) {
  return {.dtype = x.dtype(),
          .grad = grad.data,
          .grad_total = data_of(grad_total),
          .x = x.data,
          .weight = weight.data,
          .dx = dx.data,
          .dw = dw.data,
          .dw_partials = dw_partials.data,
          .partials = dw_partials.size(0),
          .grad_rows = rows(grad),
          .grad_total_rows = grad_total ? rows(*grad_total) : Rows{},
          .x_rows = rows(x),
          .C = x.size(-1),
          .eps = float(eps)};
}

// The generator of random_bits.py: the key (k0, k1) of a seed and a stream.
inline void random_key(uint64_t seed, uint64_t stream, uint32_t (&key)[2]) {
  uint64_t x = seed + (stream + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  key[0] = uint32_t(x);
  key[1] = uint32_t(x >> 32);
}

inline AdamwArgs adamw_args(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                            const Tensor& exp_avg_sq, int64_t step, double lr, double beta1,
                            double beta2, double eps, double weight_decay, double grad_scale,
                            int64_t seed, const OptionalTensor& exp_avg_scale,
                            const OptionalTensor& exp_avg_sq_scale) {
  AdamwArgs args{.dtype = param.dtype(),
                 .grad_dtype = grad.dtype(),
                 .param = param.data,
                 .grad = grad.data,
                 .exp_avg = exp_avg.data,
                 .exp_avg_sq = exp_avg_sq.data,
                 .exp_avg_scale = static_cast<float*>(data_of(exp_avg_scale)),
                 .exp_avg_sq_scale = static_cast<float*>(data_of(exp_avg_sq_scale)),
                 .n = param.numel(),
                 .grad_scale = float(grad_scale),
                 .towards_grad = float(1 - beta1),
                 .beta2 = float(beta2),
                 .of_square = float(1 - beta2),
                 .correction = float(1 / std::sqrt(1 - std::pow(beta2, double(step)))),
                 .eps = float(eps),
                 .decay = float(1 - lr * weight_decay),
                 .step_size = float(lr / (1 - std::pow(beta1, double(step)))),
                 .stochastic = seed >= 0};
  random_key(uint64_t(seed), 0, args.param_key);
  random_key(uint64_t(seed), 1, args.moments_key);
  return args;
}

inline SwigluArgs swiglu_args(const Tensor& gate, const Tensor& up, const Tensor& h) {
  return {.dtype = gate.dtype(),
          .gate = gate.data,
          .up = up.data,
          .h = h.data,
          .gate_rows = rows(gate),
          .up_rows = rows(up),
          .F = gate.size(-1)};
}

inline SwigluBackwardArgs swiglu_backward_args(const Tensor& grad, const Tensor& gate,
                                               const Tensor& up, const Tensor& d_gate,
                                               const Tensor& d_up) {
  return {.dtype = gate.dtype(),
          .grad = grad.data,
          .gate = gate.data,
          .up = up.data,
          .d_gate = d_gate.data,
          .d_up = d_up.data,
          .grad_rows = rows(grad),
          .gate_rows = rows(gate),
          .up_rows = rows(up),
          .F = gate.size(-1)};
}

// cos, sin (T, D/2), or (B, T, D/2) where each row has its own.
inline RopeArgs rope_args(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                          bool interleaved, const Tensor& q_out, const Tensor& k_out) {
  const auto stride_b = [](const Tensor& x) { return x.ndim == 3 ? x.stride(0) : 0; };
  return {.dtype = q.dtype(),
          .q = heads(q),
          .k = heads(k),
          .q_out = q_out.data,
          .k_out = k_out.data,
          .cos = cos.as<float>(),
          .sin = sin.as<float>(),
          .cos_stride_b = stride_b(cos),
          .cos_stride_t = cos.stride(-2),
          .sin_stride_b = stride_b(sin),
          .sin_stride_t = sin.stride(-2),
          .B = q.size(0),
          .T = q.size(1),
          .H = q.size(2),
          .K = k.size(2),
          .D = q.size(3),
          .interleaved = interleaved};
}

inline KvAppendArgs kv_append_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cos, const Tensor& sin, const Tensor& k_cache,
                                   const Tensor& v_cache, const Tensor& lengths, bool interleaved,
                                   const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                                   const Tensor& q_out) {
  return {.dtype = q.dtype(),
          .q = heads(q),
          .k = heads(k),
          .v = heads(v),
          .q_out = q_out.data,
          .cos = cos.as<float>(),
          .sin = sin.as<float>(),
          .cos_stride = cos.stride(0),
          .sin_stride = sin.stride(0),
          .k_cache = heads(k_cache),
          .v_cache = heads(v_cache),
          .k_scales = head_scales(k_scales),
          .v_scales = head_scales(v_scales),
          .lengths = lengths.as<int64_t>(),
          .lengths_stride = lengths.stride(0),
          .B = q.size(0),
          .T = q.size(1),
          .S = k_cache.size(1),
          .P = cos.size(0),
          .H = q.size(2),
          .K = k.size(2),
          .D = q.size(3),
          .interleaved = interleaved};
}

inline ScoreScale score_scale(float scale) {
  if (scale == 0.f) return {0.f, 1.f, 1.44269504f};
  int exponent;
  const float mantissa = std::frexp(scale, &exponent), factor = 2 * std::fabs(mantissa);
  return {std::ldexp(std::copysign(1.f, mantissa), exponent - 1), factor, factor * 1.44269504f};
}

// Without a scale it is 1 / sqrt(D). No lse, or an empty one, is not written.
inline AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                    std::optional<double> scale, const OptionalTensor& lengths,
                                    const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                                    const OptionalTensor& cu_seqlens, const Tensor& o,
                                    const OptionalTensor& lse) {
  const int64_t D = q.size(3);
  return {.dtype = q.dtype(),
          .q = heads(q),
          .k = heads(k),
          .v = heads(v),
          .k_scales = head_scales(k_scales),
          .v_scales = head_scales(v_scales),
          .o = o.data,
          .lse = lse && lse->numel() ? lse->data : nullptr,
          .lse_stride = q.size(1),
          .lengths = static_cast<const int64_t*>(data_of(lengths)),
          .cu_seqlens = static_cast<const int32_t*>(data_of(cu_seqlens)),
          .documents = cu_seqlens ? cu_seqlens->size(0) - 1 : 0,
          .B = q.size(0),
          .T = q.size(1),
          .S = k.size(1),
          .H = q.size(2),
          .K = k.size(2),
          .D = D,
          .causal = causal,
          .scale = score_scale(float(scale ? *scale : 1 / std::sqrt(double(D))))};
}

// x and y give the sizes: a gated weight has twice as many rows as y has columns.
inline LinearArgs linear_args(const Tensor& x, const Tensor& weight, const Tensor& y) {
  return {.dtype = x.dtype(),
          .x = x.data,
          .weight = weight.data,
          .y = y.data,
          .rows = rows(x),
          .C_in = x.size(-1),
          .C_out = y.size(-1)};
}

// The same product as one of W's rows with those of x.
inline GemmArgs gemm_args(const LinearArgs& a) {
  return {.dtype = a.dtype,
          .rows = {a.weight, {1, 1, a.C_out, 0, 0, a.C_in}, false},
          .lanes = {a.x, a.rows, false},
          .out = a.y,
          .out_transposed = true,
          .R = a.C_out,
          .L = a.rows.count(),
          .K = a.C_in};
}

inline QuantizedWeight quantized_weight(const Tensor& qdata, const Tensor& scales,
                                        const OptionalTensor& minima, int64_t C_in, int64_t C_out,
                                        int64_t bits, int64_t group_size) {
  return {.qdata = qdata.as<uint8_t>(),
          .scales = scales.data,
          .minima = data_of(minima),
          .C_in = C_in,
          .C_out = C_out,
          .group_size = group_size,
          .bits = int(bits)};
}

inline LinearQuantizedArgs linear_quantized_args(const Tensor& x, const Tensor& qdata,
                                                 const Tensor& scales, const OptionalTensor& minima,
                                                 int64_t bits, int64_t group_size, const Tensor& y) {
  return {.dtype = x.dtype(),
          .x = x.data,
          .weight = quantized_weight(qdata, scales, minima, x.size(-1), y.size(-1), bits, group_size),
          .y = y.data,
          .rows = rows(x)};
}

}  // namespace llama_fast
