// llama_fast._cuda: the CUDA kernels with pointers and sizes as integers. Python has checked every
// argument before it calls; nothing is checked twice here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace llama_fast::cuda;

namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// A device's index, the stream as an integer, and whether kernels may overlap.
using Place = std::array<uintptr_t, 3>;
Target target(const Place& place) {
  return {int(place[0]), pointer<void>(place[1]), place[2] != 0};
}

// n0, n1, n2, stride0, stride1, stride2
using Layout = std::array<int64_t, 6>;
Rows rows(const Layout& l) { return {l[0], l[1], l[2], l[3], l[4], l[5]}; }

// Of a (B, T, heads, D) tensor; the last one is 1.
using Strides = std::array<int64_t, 4>;
Heads heads(uintptr_t data, int64_t count, const Strides& s) {
  return {pointer<void>(data), count, s[0], s[1], s[2]};
}

// Of a (B, T, heads) tensor of scales.
using ScaleStrides = std::array<int64_t, 3>;
HeadScales scales(uintptr_t data, const ScaleStrides& s) {
  return {pointer<float>(data), {s[0], s[1], s[2]}};
}
HeadStrides head_strides(const Strides& s) { return {s[0], s[1], s[2]}; }

RmsNormBackwardArgs norm_backward(int dtype, uintptr_t grad, uintptr_t grad_total, uintptr_t x,
                                  uintptr_t weight, uintptr_t dx, uintptr_t dw, uintptr_t dw_parts,
                                  int64_t parts, const Layout& grad_layout,
                                  const Layout& grad_total_layout, const Layout& x_layout,
                                  int64_t C, float eps) {
  return {DType(dtype), pointer<void>(grad), pointer<void>(grad_total), pointer<void>(x),
          pointer<void>(weight), pointer<void>(dx), pointer<void>(dw), pointer<void>(dw_parts),
          parts, rows(grad_layout), rows(grad_total_layout), rows(x_layout), C, eps};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "llama_fast's CUDA kernels; called by llama_fast.backends.cuda only";
  py::register_exception<LaunchError>(m, "LaunchError", PyExc_RuntimeError);

  m.def("architectures", [] { return std::string(LLAMA_FAST_CUDA_ARCHITECTURES); },
        "The GPU architectures of this build, such as 80,90a,120; +PTX behind those newer too.");
  m.def("device_type", &device_type, "The device of the tensors that these kernels take.");
  m.def("multiprocessors", &multiprocessors, py::arg("device"));

  m.def("rms_norm", [](const Place& place, int dtype, uintptr_t x, uintptr_t weight, uintptr_t y,
                       const Layout& layout, int64_t C, float eps) {
    rms_norm(target(place), {DType(dtype), pointer<void>(x), pointer<void>(weight),
                             pointer<void>(y), rows(layout), C, eps});
  });

  m.def("rms_norm_backward", [](const Place& place, int dtype, uintptr_t grad, uintptr_t x,
                                uintptr_t weight, uintptr_t dx, uintptr_t dw, uintptr_t dw_parts,
                                int64_t parts, const Layout& grad_layout, const Layout& x_layout,
                                int64_t C, float eps) {
    rms_norm_backward(target(place), norm_backward(dtype, grad, 0, x, weight, dx, dw, dw_parts,
                                                   parts, grad_layout, {}, x_layout, C, eps));
  });

  m.def("add_rms_norm", [](const Place& place, int dtype, uintptr_t x, uintptr_t residual,
                           uintptr_t weight, uintptr_t y, uintptr_t total, const Layout& x_layout,
                           const Layout& residual_layout, int64_t C, float eps) {
    add_rms_norm(target(place), {DType(dtype), pointer<void>(x), pointer<void>(residual),
                                 pointer<void>(weight), pointer<void>(y), pointer<void>(total),
                                 rows(x_layout), rows(residual_layout), C, eps});
  });

  m.def("add_rms_norm_backward", [](const Place& place, int dtype, uintptr_t grad,
                                    uintptr_t grad_total, uintptr_t x, uintptr_t weight,
                                    uintptr_t dx, uintptr_t dw, uintptr_t dw_parts, int64_t parts,
                                    const Layout& grad_layout, const Layout& grad_total_layout,
                                    const Layout& x_layout, int64_t C, float eps) {
    add_rms_norm_backward(target(place),
                          norm_backward(dtype, grad, grad_total, x, weight, dx, dw, dw_parts,
                                        parts, grad_layout, grad_total_layout, x_layout, C, eps));
  });

  m.def("swiglu", [](const Place& place, int dtype, uintptr_t gate, uintptr_t up, uintptr_t h,
                     const Layout& gate_layout, const Layout& up_layout, int64_t F) {
    swiglu(target(place), {DType(dtype), pointer<void>(gate), pointer<void>(up), pointer<void>(h),
                           rows(gate_layout), rows(up_layout), F});
  });

  m.def("swiglu_backward", [](const Place& place, int dtype, uintptr_t grad, uintptr_t gate,
                              uintptr_t up, uintptr_t d_gate, uintptr_t d_up,
                              const Layout& grad_layout, const Layout& gate_layout,
                              const Layout& up_layout, int64_t F) {
    swiglu_backward(target(place), {DType(dtype), pointer<void>(grad), pointer<void>(gate),
                                    pointer<void>(up), pointer<void>(d_gate), pointer<void>(d_up),
                                    rows(grad_layout), rows(gate_layout), rows(up_layout), F});
  });

  m.def("rope", [](const Place& place, int dtype, uintptr_t q, const Strides& q_strides,
                   uintptr_t k, const Strides& k_strides, uintptr_t q_out, uintptr_t k_out,
                   uintptr_t cos, int64_t cos_stride_b, int64_t cos_stride_t, uintptr_t sin,
                   int64_t sin_stride_b, int64_t sin_stride_t, int64_t B, int64_t T, int64_t H,
                   int64_t K, int64_t D, bool interleaved) {
    rope(target(place), {DType(dtype), heads(q, H, q_strides), heads(k, K, k_strides),
                         pointer<void>(q_out), pointer<void>(k_out), pointer<float>(cos),
                         pointer<float>(sin), cos_stride_b, cos_stride_t, sin_stride_b,
                         sin_stride_t, B, T, D, interleaved});
  });

  m.def("kv_append", [](const Place& place, int dtype, uintptr_t q, const Strides& q_strides,
                        uintptr_t k, const Strides& k_strides, uintptr_t v,
                        const Strides& v_strides, uintptr_t q_out, uintptr_t cos,
                        int64_t cos_stride, uintptr_t sin, int64_t sin_stride, uintptr_t k_cache,
                        const Strides& k_cache_strides, uintptr_t v_cache,
                        const Strides& v_cache_strides, uintptr_t lengths, int64_t lengths_stride,
                        int64_t B, int64_t T, int64_t S, int64_t P, int64_t H, int64_t K,
                        int64_t D, bool interleaved) {
    kv_append(target(place),
              {DType(dtype), heads(q, H, q_strides), heads(k, K, k_strides),
               heads(v, K, v_strides), pointer<void>(q_out), pointer<float>(cos),
               pointer<float>(sin), cos_stride, sin_stride, heads(k_cache, K, k_cache_strides),
               heads(v_cache, K, v_cache_strides), pointer<int64_t>(lengths), lengths_stride, B, T,
               S, P, D, interleaved});
  });

  m.def("kv_append_quantized", [](const Place& place, int dtype, uintptr_t q,
                                  const Strides& q_strides, uintptr_t k, const Strides& k_strides,
                                  uintptr_t v, const Strides& v_strides, uintptr_t q_out,
                                  uintptr_t cos, int64_t cos_stride, uintptr_t sin,
                                  int64_t sin_stride, uintptr_t k_codes,
                                  const Strides& k_codes_strides, uintptr_t k_scales,
                                  const ScaleStrides& k_scales_strides, uintptr_t v_codes,
                                  const Strides& v_codes_strides, uintptr_t v_scales,
                                  const ScaleStrides& v_scales_strides, uintptr_t lengths,
                                  int64_t lengths_stride, int64_t B, int64_t T, int64_t S,
                                  int64_t P, int64_t H, int64_t K, int64_t D, bool interleaved) {
    kv_append_quantized(
        target(place),
        {{DType(dtype), heads(q, H, q_strides), heads(k, K, k_strides), heads(v, K, v_strides),
          pointer<void>(q_out), pointer<float>(cos), pointer<float>(sin), cos_stride, sin_stride,
          heads(k_codes, K, k_codes_strides), heads(v_codes, K, v_codes_strides),
          pointer<int64_t>(lengths), lengths_stride, B, T, S, P, D, interleaved},
         scales(k_scales, k_scales_strides),
         scales(v_scales, v_scales_strides)});
  });

  const auto of_linear = [](auto run) {
    return [run](const Place& place, int dtype, uintptr_t x, uintptr_t weight, uintptr_t y,
                 const Layout& layout, int64_t C_in, int64_t C_out) {
      run(target(place), LinearArgs{DType(dtype), pointer<void>(x), pointer<void>(weight),
                                    pointer<void>(y), rows(layout), C_in, C_out});
    };
  };
  m.def("linear", of_linear(&linear));
  m.def("linear_swiglu", of_linear(&linear_swiglu));

  const auto of_quantized = [](auto run) {
    return [run](const Place& place, int dtype, uintptr_t x, uintptr_t codes, uintptr_t scales,
                 uintptr_t offsets, uintptr_t y, const Layout& layout, int64_t C_in, int64_t C_out,
                 int64_t bits, int64_t group_size) {
      run(target(place),
          LinearQuantizedArgs{DType(dtype), pointer<void>(x), pointer<void>(codes),
                              pointer<void>(scales), pointer<void>(offsets), pointer<void>(y),
                              rows(layout), C_in, C_out, bits, group_size});
    };
  };
  m.def("linear_quantized", of_quantized(&linear_quantized));
  m.def("linear_swiglu_quantized", of_quantized(&linear_swiglu_quantized));

  m.def("attention_part_bytes", &attention_part_bytes, py::arg("D"));

  m.def("attention", [](const Place& place, int dtype, uintptr_t q, uintptr_t k, uintptr_t v,
                        uintptr_t o, uintptr_t lse, uintptr_t lengths,
                        const std::array<int64_t, 4>& q_shape,
                        const std::array<int64_t, 4>& k_shape, const Strides& q_strides,
                        const Strides& k_strides, const Strides& v_strides, bool causal,
                        float scale, bool warpgroups, int64_t splits, uintptr_t parts,
                        uintptr_t arrived) {
    const auto [B, T, H, D] = q_shape;
    attention(target(place),
              {DType(dtype), pointer<void>(q), pointer<void>(k), pointer<void>(v),
               pointer<void>(o), pointer<float>(lse), pointer<int64_t>(lengths), B, T, k_shape[1],
               H, k_shape[2], D, head_strides(q_strides), head_strides(k_strides),
               head_strides(v_strides), causal, scale, warpgroups, splits, pointer<void>(parts),
               pointer<int>(arrived)});
  });

  m.def("attention_quantized", [](const Place& place, int dtype, uintptr_t q, uintptr_t k_codes,
                                  uintptr_t k_scales, uintptr_t v_codes, uintptr_t v_scales,
                                  uintptr_t o, uintptr_t lengths,
                                  const std::array<int64_t, 4>& q_shape,
                                  const std::array<int64_t, 4>& k_shape, const Strides& q_strides,
                                  const Strides& k_strides, const ScaleStrides& k_scales_strides,
                                  const Strides& v_strides, const ScaleStrides& v_scales_strides,
                                  bool causal, float scale, bool warpgroups, int64_t splits,
                                  uintptr_t parts, uintptr_t arrived, uintptr_t wide_k,
                                  uintptr_t wide_v, int64_t wide_rows) {
    const auto [B, T, H, D] = q_shape;
    attention_quantized(
        target(place),
        {{DType(dtype), pointer<void>(q), pointer<void>(k_codes), pointer<void>(v_codes),
          pointer<void>(o), nullptr, pointer<int64_t>(lengths), B, T, k_shape[1], H, k_shape[2], D,
          head_strides(q_strides), head_strides(k_strides), head_strides(v_strides), causal, scale,
          warpgroups, splits, pointer<void>(parts), pointer<int>(arrived)},
         scales(k_scales, k_scales_strides),
         scales(v_scales, v_scales_strides),
         pointer<void>(wide_k),
         pointer<void>(wide_v),
         wide_rows});
  });
}
