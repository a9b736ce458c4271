// llama_fast._cpu: the CPU kernels. Python has checked every argument before it calls; nothing is
// checked twice here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/allocator.h"
#include "bindings/arguments.h"
#include "bindings/fork.h"
#include "bindings/signature.h"
#include "bindings/function.h"
#include "bindings/tensor.h"
#include "bindings/tiles.h"
#include "bindings/unchanged.h"
#include "cpu/kernel_choice.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace llama_fast;

namespace {

// The instruction sets of this build that this CPU has, best first.
std::vector<std::pair<std::string, const KernelTable*>> usable_isas() {
  std::vector<std::pair<std::string, const KernelTable*>> usable;
#ifdef __x86_64__
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") &&
                                     __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vnni");
  [[maybe_unused]] const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  [[maybe_unused]] const bool avx_vnni = avx2 && __builtin_cpu_supports("avxvnni");
#endif
#ifdef LLAMA_FAST_HAS_AMX
  if (avx512_bf16 && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
      MAY_USE_TILES)
    usable.emplace_back("amx", &amx::kernels);
#endif
#ifdef LLAMA_FAST_HAS_AVX512_BF16
  if (avx512_bf16) usable.emplace_back("avx512_bf16", &avx512_bf16::kernels);
#endif
#ifdef LLAMA_FAST_HAS_AVX512
  if (avx512) usable.emplace_back("avx512", &avx512::kernels);
#endif
#ifdef LLAMA_FAST_HAS_AVX_VNNI
  if (avx_vnni) usable.emplace_back("avx_vnni", &avx_vnni::kernels);
#endif
#ifdef LLAMA_FAST_HAS_AVX2
  if (avx2) usable.emplace_back("avx2", &avx2::kernels);
#endif
#ifdef LLAMA_FAST_HAS_SCALAR
  usable.emplace_back("scalar", &scalar::kernels);
#endif
  return usable;
}

const auto usable = usable_isas();
auto chosen = usable.front();

// The instruction sets of this build, whatever the CPU has, best first.
std::vector<std::string> built_isas() {
#ifdef LLAMA_FAST_HAS_AVX2
  return {"amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "scalar"};
#else
  return {"scalar"};
#endif
}

void set_isa(const std::string& name) {
  for (const auto& isa : usable) {
    if (isa.first == name) {
      chosen = isa;
      return;
    }
  }
  throw std::invalid_argument("this CPU, or this build, has no instruction set '" + name + "'");
}

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// What makes the signatures of calls with tensors of these types, or None where their library does
// not offer DLPack's C functions.
py::object call_signatures(py::type tensor, py::type parameter, py::function fallback) {
  const auto* api = exchange_api(tensor);
  if (!api) return py::none();
  return py::cpp_function(
      [of = CallSignature(std::move(tensor), std::move(parameter), api, std::move(fallback))](
          const py::tuple& args, bool grad) { return of(args, grad); });
}

// What says whether these are unchanged, or None without `exchange_api`.
py::object unchanged(const py::type& tensor, const py::list& dicts, const py::list& tensors) {
  const auto* api = exchange_api(tensor);
  if (!api) return py::none();
  return py::cpp_function([of = Unchanged(dicts, tensors, api)] { return of.holds(); });
}

// The first row that would end beyond the cache or the tables, or -1.
int64_t row_beyond(const KvAppendArgs& a) {
  for (int64_t b = 0; b < a.B; ++b)
    if (a.lengths[b * a.lengths_stride] > std::min(a.S, a.P)) return b;
  return -1;
}
// The first row whose length exceeds S, or the first document that does not end where it may, or -1.
int64_t row_beyond(const AttentionArgs& a) {
  for (int64_t b = 0; a.lengths && b < a.B; ++b)
    if (a.lengths[b] > a.S) return b;
  if (!a.cu_seqlens) return -1;
  if (a.cu_seqlens[0] != 0) return 0;
  for (int64_t i = 0; i < a.documents; ++i)
    if (a.cu_seqlens[i + 1] < a.cu_seqlens[i]) return i;
  return a.cu_seqlens[a.documents] == a.T ? -1 : a.documents;
}

// Whether the bits of a row may not depend on how many others are multiplied beside it.
bool batch_invariant = false;

// Whether tile registers multiply this type: GEMV and GEMM are one kernel then.
bool by_tiles(DType dtype) { return chosen.first == "amx" && dtype == DType::bf16; }

bool on_amd() {
#ifdef __x86_64__
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Whether GEMMs are made here rather than by torch, in the instruction set in use: for the half types,
// where torch (MKL, oneDNN) converts them a slow way, and for float32 on AMD's CPUs, on which MKL takes
// 1.05 to 1.7 times as long (not so for the gradients). With AVX512_BF16 oneDNN has bfloat16 instructions
// to use, if torch was built with it; and no vector instructions of ours means that torch's are better.
bool own_gemm(DType dtype, bool onednn) {
  if (batch_invariant || by_tiles(dtype)) return true;
  if (chosen.first == "scalar") return false;
  if (dtype == DType::f32) return on_amd();
  return dtype == DType::f16 || !(onednn && chosen.second->bf16_pairs);
}
bool own_gradient(DType dtype, bool onednn) {
  return own_gemm(dtype, onednn) && (batch_invariant || dtype != DType::f32);
}

std::optional<Walk> asked_walk;

// Rows fetched each on its own, without which older CPUs do not reach what memory gives, cost Zen 4 and
// Zen 5, AMD's with AVX-512, a fifth to a half of it; see docs/log.md.
Walk gemv_walk() {
  bool stream = false;
#ifdef __x86_64__
  stream = on_amd() && __builtin_cpu_supports("avx512f");
#endif
  return asked_walk.value_or(stream ? Walk::stream : Walk::tiles);
}

const char* name_of(Walk walk) { return walk == Walk::stream ? "stream" : "tiles"; }

void set_gemv_walk(const std::optional<std::string>& name) {
  asked_walk.reset();
  for (const Walk walk : {Walk::tiles, Walk::stream})
    if (name && *name == name_of(walk)) asked_walk = walk;
  if (name && !asked_walk) throw std::invalid_argument("no walk is named '" + *name + "'");
}

const char* name_of(Product product) {
  return product == Product::gemv ? "gemv" : product == Product::gemm ? "gemm" : "torch";
}

// An uninitialised tensor as a capsule that torch.from_dlpack takes, which renames it.
py::capsule large_tensor(bool bfloat16, int64_t itemsize, std::vector<int64_t> shape) {
  auto* managed = BlockTensor::make(bfloat16 ? kDLBfloat : kDLFloat, itemsize, std::move(shape));
  return py::capsule(managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a tensor has it
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    unused->deleter(unused);
  });
}

// Kernels launched by one thread, to be launched again with the same pointers.
struct Tape {
  std::vector<std::function<void()>> launches;
  void run() const {
    py::gil_scoped_release unlocked;
    for (const auto& launch : launches) launch();
  }
};
thread_local Tape* recording = nullptr;

// Kernels run without the interpreter lock, so that other Python threads go on.
template <class Run> void launch(const Run& run) {
  if (recording) recording->launches.emplace_back(run);
  py::gil_scoped_release unlocked;
  run();
}
template <class Args> void launch(void (*KernelTable::*kernel)(const Args&), const Args& args) {
  launch([kernel, args] { (chosen.second->*kernel)(args); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "llama_fast's CPU kernels; called by llama_fast.backends.cpu only";
  stop_threads_at_fork();

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto& isa : usable) names.push_back(isa.first);
    return names;
  }, "The instruction sets that can be chosen here, best first.");
  m.def("built_isas", &built_isas, "The instruction sets of this build, best first.");
  m.def("isa", [] { return chosen.first; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("set_batch_invariant", [](bool on) { batch_invariant = on; }, py::arg("on"),
        "Whether a row's bits may not depend on how many others are multiplied beside it.");
  m.def("gemv_walk", [] { return name_of(gemv_walk()); },
        "How GEMV has a weight fetched, as tiles or as a stream: by this CPU, unless it was set.");
  m.def("set_gemv_walk", &set_gemv_walk, py::arg("name"));
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"));
  m.def("large_tensor", &large_tensor, py::arg("bfloat16"), py::arg("itemsize"), py::arg("shape"),
        "An uninitialised tensor of floats, as a DLPack capsule, in memory that is used again.");
  m.def("free_idle_blocks", [] { blocks().free_idle(); },
        "Frees what is kept for the next `large_tensor`.");

  m.def("lowest_address", &lowest_address, "Below it no tensor has memory.");
  m.def("call_signatures", &call_signatures, py::arg("tensor"), py::arg("parameter"),
        py::arg("fallback"));
  m.def("unchanged", &unchanged, py::arg("tensor"), py::arg("dicts"), py::arg("tensors"));

  py::class_<Tape>(m, "Tape", "The kernels that were launched while it recorded.")
      .def(py::init<>())
      .def("record", [](Tape& tape) { recording = &tape; },
           "From now on, adds every launch of this thread, until `stop`.")
      .def_static("stop", [] { recording = nullptr; })
      .def("forget", [](Tape& tape, size_t from) { tape.launches.resize(from); },
           "Forgets all launches but the first `from`.")
      .def("run", &Tape::run,
           "Launches all again. Lengths that lie in memory are not checked anew.")
      .def("__len__", [](const Tape& tape) { return tape.launches.size(); });

  m.def("read_memory", [](uintptr_t source, int64_t bytes, int64_t threads, uintptr_t sink) {
    launch(&KernelTable::read_memory,
           RooflineArgs{.source = pointer<void>(source),
                       .bytes = bytes,
                       .threads = threads,
                       .sink = pointer<float>(sink)});
  });
  m.def("copy_memory", [](uintptr_t source, uintptr_t target, int64_t bytes, int64_t threads) {
    launch(&KernelTable::copy_memory,
           RooflineArgs{.source = pointer<void>(source),
                       .target = pointer<void>(target),
                       .bytes = bytes,
                       .threads = threads});
  });
  m.def("multiply_add", [](bool pairs, int64_t steps, int64_t threads, uintptr_t sink) {
    const KernelTable& table = *chosen.second;
    launch(pairs ? &KernelTable::multiply_add_bf16 : &KernelTable::multiply_add_f32,
           RooflineArgs{.steps = steps, .threads = threads, .sink = pointer<float>(sink)});
    return steps * threads * (pairs ? table.bf16_flops : table.f32_flops);
  }, "Runs the loop and returns its floating-point operations.");

  // The ops: their results, which Python has made, come last among the tensors and are returned.

  def(m, "rms_norm", [](const Tensor& x, const Tensor& weight, double eps, const Tensor& y) {
    launch(&KernelTable::rms_norm, rms_norm_args(x, weight, eps, y));
    return y;
  });

  def(m, "norm_partials", [](int64_t rows) { return norm_partials(rows); },
      "The parts of dw that so many rows make in the backward of a norm.");
  def(m, "rms_norm_backward", [](const Tensor& grad, const OptionalTensor& grad_total,
                                const Tensor& x, const Tensor& weight, double eps,
                                const Tensor& dw_partials, const Tensor& dx, const Tensor& dw) {
    launch(&KernelTable::rms_norm_backward,
           norm_backward_args(grad, grad_total, x, weight, eps, dw_partials, dx, dw));
    return std::pair(dx, dw);
  }, "The gradient of both norms: of add_rms_norm with that of its sum, grad_total.");

  def(m, "adamw", [](const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                    const Tensor& exp_avg_sq, int64_t step, double lr, double beta1, double beta2,
                    double eps, double weight_decay, double grad_scale, int64_t seed,
                    const OptionalTensor& exp_avg_scale, const OptionalTensor& exp_avg_sq_scale) {
    launch(&KernelTable::adamw,
           adamw_args(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay,
                      grad_scale, seed, exp_avg_scale, exp_avg_sq_scale));
  }, "Writes param, the moments and their scales. A seed below 0 rounds to the nearest.");

  def(m, "add_rms_norm", [](const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                           const Tensor& y, const Tensor& total) {
    launch(&KernelTable::add_rms_norm, add_rms_norm_args(x, residual, weight, eps, y, total));
    return std::pair(y, total);
  });

  def(m, "swiglu", [](const Tensor& gate, const Tensor& up, const Tensor& h) {
    launch(&KernelTable::swiglu, swiglu_args(gate, up, h));
    return h;
  });

  def(m, "swiglu_backward", [](const Tensor& grad, const Tensor& gate, const Tensor& up,
                              const Tensor& d_gate, const Tensor& d_up) {
    launch(&KernelTable::swiglu_backward, swiglu_backward_args(grad, gate, up, d_gate, d_up));
    return std::pair(d_gate, d_up);
  });

  def(m, "rope", [](const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                   bool interleaved, const Tensor& q_out, const Tensor& k_out) {
    launch(&KernelTable::rope, rope_args(q, k, cos, sin, interleaved, q_out, k_out));
    return std::pair(q_out, k_out);
  });

  def(m, "kv_append", [](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                        const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, bool interleaved, const OptionalTensor& k_scales,
                        const OptionalTensor& v_scales, const Tensor& q_out) {
    const KvAppendArgs args = kv_append_args(q, k, v, cos, sin, k_cache, v_cache, lengths,
                                             interleaved, k_scales, v_scales, q_out);
    const int64_t b = row_beyond(args);
    if (b < 0) launch(&KernelTable::kv_append, args);
    return b;
  }, "Returns the first row that would end beyond the cache or the tables, having done nothing "
     "then, or -1.");

  def(m, "attention", [](const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                        std::optional<double> scale, const OptionalTensor& lengths,
                        const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                        const OptionalTensor& cu_seqlens, const Tensor& o,
                        const OptionalTensor& lse) {
    const AttentionArgs args =
        attention_args(q, k, v, causal, scale, lengths, k_scales, v_scales, cu_seqlens, o, lse);
    const int64_t b = row_beyond(args);
    if (b < 0)
      launch([args] {
        AttentionArgs its = args;
        its.batch_invariant = batch_invariant;
        chosen.second->attention(its);
      });
    return b;
  }, "Returns the first row whose length exceeds S, or the first document that ends where it cannot, "
     "having done nothing then, or -1. `lse` may be empty, or None.");

  def(m, "attention_backward", [](const Tensor& grad, const Tensor& q, const Tensor& k,
                                 const Tensor& v, const Tensor& o, const Tensor& lse, bool causal,
                                 std::optional<double> scale, const OptionalTensor& lengths,
                                 const OptionalTensor& cu_seqlens, const Tensor& dq,
                                 const Tensor& dk, const Tensor& dv) {
    const AttentionBackwardArgs args{
        .forward = attention_args(q, k, v, causal, scale, lengths, {}, {}, cu_seqlens, o, lse),
        .grad = heads(grad),
        .o = heads(o),
        .dq = dq.data,
        .dk = dk.data,
        .dv = dv.data};
    const int64_t b = row_beyond(args.forward);
    if (b < 0) launch(&KernelTable::attention_backward, args);
    return b;
  }, "Returns as `attention` does.");

  m.attr("GEMV_ROWS") = GEMV_ROWS;
  def(m, "gemv_rows", [](const Tensor& x, bool onednn) {
    return gemv_rows(own_gemm(x.dtype(), onednn));
  }, "The most rows of an x of this dtype that `gemv` is for, in the instruction set in use.");
  def(m, "linear_product", [](const Tensor& x, bool onednn) {
    return name_of(product_of(x.outer(), own_gemm(x.dtype(), onednn)));
  }, "What serves a linear of x in the instruction set in use: gemv, gemm or torch.");
  def(m, "gradient_product", [](const Tensor& grad, bool onednn) {
    const int64_t rows = batch_invariant ? GEMM_GRADIENT_ROWS : grad.outer();
    return name_of(product_of_gradient(rows, own_gradient(grad.dtype(), onednn)));
  }, "The same of the gradients of a linear, from that of its result.");

  def(m, "gemv", [](const Tensor& x, const Tensor& weight, const Tensor& y) {
    LinearArgs args = linear_args(x, weight, y);
    args.walk = gemv_walk();
    launch([args] {
      if (batch_invariant || by_tiles(args.dtype)) chosen.second->gemm(gemm_args(args));
      else chosen.second->gemv(args);
    });
    return y;
  }, "GEMV; or GEMM where a row's bits may not depend on the number of rows, or no GEMV is faster.");

  def(m, "linear_quantized", [](const Tensor& x, const Tensor& qdata, const Tensor& scales,
                               const OptionalTensor& minima, int64_t bits, int64_t group_size,
                               const Tensor& y) {
    auto args = linear_quantized_args(x, qdata, scales, minima, bits, group_size, y);
    args.walk = gemv_walk();
    launch(&KernelTable::linear_quantized, args);
    return y;
  });

  def(m, "linear_quantized_backward_x", [](const Tensor& grad, const Tensor& qdata,
                                          const Tensor& scales, const OptionalTensor& minima,
                                          int64_t bits, int64_t group_size, const Tensor& dx) {
    const int64_t C_in = dx.size(-1), C_out = grad.size(-1);
    const auto weight = quantized_weight(qdata, scales, minima, C_in, C_out, bits, group_size);
    const MatrixSide of_grad{grad.data, rows(grad), false};
    launch([=, dtype = dx.dtype(), R = dx.outer(), out = dx.data] {
      chosen.second->gemm({.dtype = dtype,
                           .rows = of_grad,
                           .lanes = {nullptr, {}, true, &weight},
                           .out = out,
                           .out_transposed = false,
                           .R = R,
                           .L = C_in,
                           .K = C_out});
    });
    return dx;
  }, "GEMM of grad's rows with the columns of a quantised weight.");

  def(m, "gemm", [](const Tensor& rows_tensor, bool rows_transposed, const Tensor& lanes_tensor,
                     bool lanes_transposed, int64_t K, const Tensor& out, bool out_transposed) {
    const int64_t columns = out.size(-1), outer = out.outer();
    launch(&KernelTable::gemm,
           GemmArgs{.dtype = out.dtype(),
                      .rows = {rows_tensor.data, rows(rows_tensor), rows_transposed},
                      .lanes = {lanes_tensor.data, rows(lanes_tensor), lanes_transposed},
                      .out = out.data,
                      .out_transposed = out_transposed,
                      .R = out_transposed ? columns : outer,
                      .L = out_transposed ? outer : columns,
                      .K = K});
    return out;
  }, "out[r][l] = the sum over K of rows[r][k] lanes[l][k]; out is not empty.");
}
