// llama_fast._cuda: the CUDA kernels. Python has checked every argument before it calls; nothing is
// checked twice here.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/arguments.h"
#include "bindings/function.h"
#include "cuda/kernel_choice.h"
#include "cuda/kernels.h"
#include "cuda/versions.h"

namespace py = pybind11;
using namespace llama_fast;
using namespace llama_fast::cuda;

// (a device's index, the stream as an integer, whether kernels may overlap)
template <> struct llama_fast::Argument<Target> : Number<Target> {
  explicit Argument(PyObject* x) : Number{} {
    if (!PyTuple_Check(x) || PyTuple_Size(x) != 3) throw py::type_error("a tuple of 3 is needed");
    const auto item = [&](int i) { return PyTuple_GetItem(x, i); };
    value = {int(Argument<int64_t>(item(0)).get()), PyLong_AsVoidPtr(item(1)),
             Argument<bool>(item(2)).get()};
    if (PyErr_Occurred()) throw py::error_already_set();
  }
};

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "llama_fast's CUDA kernels; called by llama_fast.backends.cuda only";
  kernel_error() = py::register_exception<LaunchError>(m, "LaunchError", PyExc_RuntimeError).ptr();

  m.def("architectures", [] { return std::string(LLAMA_FAST_CUDA_ARCHITECTURES); },
        "The GPU architectures of this build, such as 80,90a,120; +PTX behind those newer too.");
  m.def("device_type", &device_type, "The device of the tensors that these kernels take.");
  m.def("multiprocessors", &multiprocessors, py::arg("device"));
  m.def("runtime_version", &runtime_version, "The CUDA of this build, such as 13020 for 13.2.");
  m.def("driver_version", &driver_version,
        "The latest CUDA that this machine's driver serves; 0 where there is none.");
  m.def("attention_partial_bytes", &attention_partial_bytes, py::arg("D"));

  m.attr("GEMV_ROWS") = GEMV_ROWS;
  m.def("is_decode", &is_decode, py::arg("T"), py::arg("H"), py::arg("K"),
        "Whether attention splits the keys of a KV head over blocks.");
  m.def("kv_splits", &kv_splits, py::arg("B"), py::arg("K"), py::arg("S"),
        py::arg("multiprocessors"), "Over how many.");

  // The ops: their results, which Python has made, come last among the tensors and are returned.

  def(m, "rms_norm", [](Target target, const Tensor& x, const Tensor& weight, double eps,
                        const Tensor& y) {
    rms_norm(target, rms_norm_args(x, weight, eps, y));
    return y;
  });

  def(m, "rms_norm_backward", [](Target target, const Tensor& grad, const Tensor& x,
                                 const Tensor& weight, double eps, const Tensor& dw_partials,
                                 const Tensor& dx, const Tensor& dw) {
    rms_norm_backward(target,
                      norm_backward_args(grad, {}, x, weight, eps, dw_partials, dx, dw));
    return std::pair(dx, dw);
  });

  def(m, "add_rms_norm", [](Target target, const Tensor& x, const Tensor& residual,
                            const Tensor& weight, double eps, const Tensor& y,
                            const Tensor& total) {
    add_rms_norm(target, add_rms_norm_args(x, residual, weight, eps, y, total));
    return std::pair(y, total);
  });

  def(m, "add_rms_norm_backward", [](Target target, const Tensor& grad, const Tensor& grad_total,
                                     const Tensor& total, const Tensor& weight, double eps,
                                     const Tensor& dw_partials, const Tensor& dx,
                                     const Tensor& dw) {
    add_rms_norm_backward(
        target, norm_backward_args(grad, grad_total, total, weight, eps, dw_partials, dx, dw));
    return std::pair(dx, dw);
  });

  def(m, "swiglu", [](Target target, const Tensor& gate, const Tensor& up, const Tensor& h) {
    swiglu(target, swiglu_args(gate, up, h));
    return h;
  });

  def(m, "swiglu_backward", [](Target target, const Tensor& grad, const Tensor& gate,
                               const Tensor& up, const Tensor& d_gate, const Tensor& d_up) {
    swiglu_backward(target, swiglu_backward_args(grad, gate, up, d_gate, d_up));
    return std::pair(d_gate, d_up);
  });

  def(m, "rope", [](Target target, const Tensor& q, const Tensor& k, const Tensor& cos,
                    const Tensor& sin, bool interleaved, const Tensor& q_out,
                    const Tensor& k_out) {
    rope(target, rope_args(q, k, cos, sin, interleaved, q_out, k_out));
    return std::pair(q_out, k_out);
  });

  def(m, "kv_append", [](Target target, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& cos, const Tensor& sin, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& lengths, bool interleaved,
                         const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                         const Tensor& q_out) {
    kv_append(target, kv_append_args(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved,
                                     k_scales, v_scales, q_out));
    return q_out;
  });

  def(m, "linear", [](Target target, const Tensor& x, const Tensor& weight, const Tensor& y) {
    linear(target, linear_args(x, weight, y));
    return y;
  });

  def(m, "linear_swiglu", [](Target target, const Tensor& x, const Tensor& weight,
                             const Tensor& y) {
    linear_swiglu(target, linear_args(x, weight, y));
    return y;
  });

  def(m, "linear_quantized", [](Target target, const Tensor& x, const Tensor& qdata,
                                const Tensor& scales, const OptionalTensor& minima, int64_t bits,
                                int64_t group_size, const Tensor& y) {
    linear_quantized(target, linear_quantized_args(x, qdata, scales, minima, bits, group_size, y));
    return y;
  });

  def(m, "linear_swiglu_quantized", [](Target target, const Tensor& x, const Tensor& qdata,
                                       const Tensor& scales, const OptionalTensor& minima,
                                       int64_t bits, int64_t group_size, const Tensor& y) {
    linear_swiglu_quantized(
        target, linear_quantized_args(x, qdata, scales, minima, bits, group_size, y));
    return y;
  });

  def(m, "attention", [](Target target, const Tensor& q, const Tensor& k, const Tensor& v,
                         bool causal, std::optional<double> scale, const OptionalTensor& lengths,
                         const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                         const OptionalTensor& cu_seqlens, int64_t splits, const OptionalTensor& partials,
                         const OptionalTensor& arrived, const OptionalTensor& k_scratch,
                         const OptionalTensor& v_scratch, bool warpgroups, const Tensor& o,
                         const Tensor& lse) {
    attention(target, attention_args(q, k, v, causal, scale, lengths, k_scales, v_scales, cu_seqlens,
                                     o, lse),
              {.splits = splits,
               .partials = data_of(partials),
               .arrived = static_cast<int*>(data_of(arrived)),
               .k = data_of(k_scratch),
               .v = data_of(v_scratch),
               .rows = k_scratch ? k_scratch->size(0) : 0,
               .warpgroups = warpgroups});
    return std::pair(o, lse);
  });
}
