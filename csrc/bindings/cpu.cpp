// llama_fast._cpu: the CPU kernels with pointers and sizes as integers. Python has checked every
// argument before it calls; nothing is checked twice here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/blocks.h"
#include "bindings/kind_of_call.h"
#include "bindings/unchanged.h"
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
#endif
#ifdef LLAMA_FAST_HAS_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16"))
    usable.emplace_back("avx512_bf16", &avx512_bf16::kernels);
#endif
#ifdef LLAMA_FAST_HAS_AVX512
  if (avx512) usable.emplace_back("avx512", &avx512::kernels);
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
  return {"avx512_bf16", "avx512", "avx2", "scalar"};
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

// DLPack's C functions for tensors of this type, or null where their library does not offer them
// (torch does from 2.10 on).
const DLPackExchangeAPI* exchange_api(const py::type& tensor) {
  const auto capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->major == 1 && api->dltensor_from_py_object ? api : nullptr;
}

// What makes the kinds of calls with tensors of these types, or None without `exchange_api`.
py::object kinds_of_calls(py::type tensor, py::type parameter, py::function fallback) {
  const auto* api = exchange_api(tensor);
  if (!api) return py::none();
  return py::cpp_function(
      [kind = KindOfCall(std::move(tensor), std::move(parameter), api, std::move(fallback))](
          const py::tuple& args, bool grad) { return kind(args, grad); });
}

// What says whether these are unchanged, or None without `exchange_api`.
py::object unchanged(const py::type& tensor, const py::list& dicts, const py::list& tensors) {
  const auto* api = exchange_api(tensor);
  if (!api) return py::none();
  return py::cpp_function([of = Unchanged(dicts, tensors, api)] { return of.holds(); });
}

// n0, n1, n2, stride0, stride1, stride2
using Layout = std::array<int64_t, 6>;
Rows rows(const Layout& l) { return {l[0], l[1], l[2], l[3], l[4], l[5]}; }

// Of a (B, T, heads, D) tensor; the last one is 1.
using Strides = std::array<int64_t, 4>;
HeadStrides heads(const Strides& s) { return {s[0], s[1], s[2]}; }
Heads heads(uintptr_t data, int64_t count, const Strides& s) {
  return {pointer<void>(data), count, heads(s)};
}

// Strides of codes (B, S, K, D) and scales (B, S, K) of a cache in 8 bits.
using CodedStrides = std::pair<Strides, std::array<int64_t, 3>>;
QuantizedHeads coded(const CodedStrides& s) {
  return {nullptr, heads(s.first), nullptr, {s.second[0], s.second[1], s.second[2]}};
}

// The first row that would end beyond `most` slots of a cache, or -1.
int64_t row_beyond(const KvAppendArgs& call, int64_t most) {
  for (int64_t b = 0; b < call.B; ++b)
    if (call.lengths[b * call.lengths_stride] > most) return b;
  return -1;
}
// The first row whose length exceeds S, or -1.
int64_t row_beyond(const AttentionArgs& call) {
  for (int64_t b = 0; call.lengths && b < call.B; ++b)
    if (call.lengths[b] > call.S) return b;
  return -1;
}

void set_tensors(KvAppendArgs& call, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t cos,
                 uintptr_t sin, uintptr_t q_out) {
  call.q.data = pointer<void>(q);
  call.k.data = pointer<void>(k);
  call.v.data = pointer<void>(v);
  call.cos = pointer<float>(cos);
  call.sin = pointer<float>(sin);
  call.q_out = pointer<void>(q_out);
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
template <class Args> void launch(void (*KernelTable::*kernel)(const Args&), const Args& args) {
  const auto run = [kernel, args] { (chosen.second->*kernel)(args); };
  if (recording) recording->launches.emplace_back(run);
  py::gil_scoped_release unlocked;
  run();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "llama_fast's CPU kernels; called by llama_fast.backends.cpu only";

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto& isa : usable) names.push_back(isa.first);
    return names;
  }, "The instruction sets that can be chosen here, best first.");
  m.def("built_isas", &built_isas, "The instruction sets of this build, best first.");
  m.def("isa", [] { return chosen.first; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"));
  m.def("large_tensor", &large_tensor, py::arg("bfloat16"), py::arg("itemsize"), py::arg("shape"),
        "An uninitialised tensor of floats, as a DLPack capsule, in memory that is used again.");
  m.def("free_idle_blocks", [] { blocks().free_idle(); },
        "Frees what is kept for the next `large_tensor`.");

  m.def("lowest_address", &lowest_address, "Below it no tensor has memory.");
  m.def("kinds_of_calls", &kinds_of_calls, py::arg("tensor"), py::arg("parameter"),
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
    launch(&KernelTable::read_memory, CeilingArgs{pointer<void>(source), nullptr, bytes, 0,
           threads, pointer<float>(sink)});
  });
  m.def("copy_memory", [](uintptr_t source, uintptr_t target, int64_t bytes, int64_t threads) {
    launch(&KernelTable::copy_memory, CeilingArgs{pointer<void>(source), pointer<void>(target),
           bytes, 0, threads, nullptr});
  });
  m.def("multiply_add", [](bool pairs, int64_t steps, int64_t threads, uintptr_t sink) {
    const KernelTable& table = *chosen.second;
    launch(pairs ? &KernelTable::multiply_add_bf16 : &KernelTable::multiply_add_f32,
           CeilingArgs{nullptr, nullptr, 0, steps, threads, pointer<float>(sink)});
    return steps * threads * 12 * table.lanes * (pairs && table.bf16_pairs ? 4 : 2);
  }, "Runs the loop and returns its floating-point operations.");

  // Each of these takes what calls of one kind have in common, and returns what launches such a call:
  // it takes the addresses of the tensors.

  m.def("rms_norm", [](int dtype, const Layout& layout, int64_t C, float eps) {
    const RmsNormArgs kind{DType(dtype), nullptr, nullptr, nullptr, rows(layout), C, eps};
    return py::cpp_function([kind](uintptr_t x, uintptr_t weight, uintptr_t y) {
      RmsNormArgs call = kind;
      call.x = pointer<void>(x);
      call.weight = pointer<void>(weight);
      call.y = pointer<void>(y);
      launch(&KernelTable::rms_norm, call);
    });
  });

  m.def("add_rms_norm", [](int dtype, const Layout& x_layout, const Layout& residual_layout,
                           int64_t C, float eps) {
    const AddRmsNormArgs kind{DType(dtype), nullptr, nullptr, nullptr, nullptr, nullptr,
                              rows(x_layout), rows(residual_layout), C, eps};
    return py::cpp_function([kind](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y,
                                   uintptr_t total) {
      AddRmsNormArgs call = kind;
      call.x = pointer<void>(x);
      call.residual = pointer<void>(residual);
      call.weight = pointer<void>(weight);
      call.y = pointer<void>(y);
      call.total = pointer<void>(total);
      launch(&KernelTable::add_rms_norm, call);
    });
  });

  m.def("swiglu", [](int dtype, const Layout& gate_layout, const Layout& up_layout, int64_t F) {
    const SwigluArgs kind{DType(dtype), nullptr, nullptr, nullptr, rows(gate_layout),
                          rows(up_layout), F};
    return py::cpp_function([kind](uintptr_t gate, uintptr_t up, uintptr_t h) {
      SwigluArgs call = kind;
      call.gate = pointer<void>(gate);
      call.up = pointer<void>(up);
      call.h = pointer<void>(h);
      launch(&KernelTable::swiglu, call);
    });
  });

  m.def("rope", [](int dtype, const Strides& q_strides, const Strides& k_strides,
                   const std::array<int64_t, 2>& cos_strides,
                   const std::array<int64_t, 2>& sin_strides, int64_t B, int64_t T, int64_t H,
                   int64_t K, int64_t D, bool interleaved) {
    const RopeArgs kind{DType(dtype), heads(0, H, q_strides), heads(0, K, k_strides), nullptr,
                        nullptr, nullptr, nullptr, cos_strides[0], cos_strides[1], sin_strides[0],
                        sin_strides[1], B, T, D, interleaved};
    return py::cpp_function([kind](uintptr_t q, uintptr_t k, uintptr_t cos, uintptr_t sin,
                                   uintptr_t q_out, uintptr_t k_out) {
      RopeArgs call = kind;
      call.q.data = pointer<void>(q);
      call.k.data = pointer<void>(k);
      call.cos = pointer<float>(cos);
      call.sin = pointer<float>(sin);
      call.q_out = pointer<void>(q_out);
      call.k_out = pointer<void>(k_out);
      launch(&KernelTable::rope, call);
    });
  });

  // A call returns the first row that would end beyond the cache or the tables, having done nothing
  // then, or -1.
  m.def("kv_append", [](int dtype, const Strides& q_strides, const Strides& k_strides,
                        const Strides& v_strides, int64_t cos_stride, int64_t sin_stride,
                        const Strides& k_cache_strides, const Strides& v_cache_strides,
                        int64_t lengths_stride, int64_t B, int64_t T, int64_t S, int64_t P,
                        int64_t H, int64_t K, int64_t D, bool interleaved) {
    const KvAppendArgs kind{DType(dtype), heads(0, H, q_strides), heads(0, K, k_strides),
                            heads(0, K, v_strides), nullptr, nullptr, nullptr, cos_stride,
                            sin_stride, heads(0, K, k_cache_strides), heads(0, K, v_cache_strides),
                            nullptr, lengths_stride, B, T, D, interleaved};
    return py::cpp_function([kind, most = std::min(S, P)](
                                uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t cos, uintptr_t sin,
                                uintptr_t k_cache, uintptr_t v_cache, uintptr_t lengths,
                                uintptr_t q_out) -> int64_t {
      KvAppendArgs call = kind;
      call.lengths = pointer<int64_t>(lengths);
      if (const int64_t b = row_beyond(call, most); b >= 0) return b;
      set_tensors(call, q, k, v, cos, sin, q_out);
      call.k_cache.data = pointer<void>(k_cache);
      call.v_cache.data = pointer<void>(v_cache);
      launch(&KernelTable::kv_append, call);
      return -1;
    });
  });

  // As kv_append.
  m.def("kv_append_quantized", [](int dtype, const Strides& q_strides, const Strides& k_strides,
                                  const Strides& v_strides, int64_t cos_stride, int64_t sin_stride,
                                  const CodedStrides& k_cache_strides,
                                  const CodedStrides& v_cache_strides, int64_t lengths_stride,
                                  int64_t B, int64_t T, int64_t S, int64_t P, int64_t H, int64_t K,
                                  int64_t D, bool interleaved) {
    const KvAppendQuantizedArgs kind{
        {DType(dtype), heads(0, H, q_strides), heads(0, K, k_strides), heads(0, K, v_strides),
         nullptr, nullptr, nullptr, cos_stride, sin_stride, {}, {}, nullptr, lengths_stride, B, T,
         D, interleaved},
        coded(k_cache_strides), coded(v_cache_strides)};
    return py::cpp_function([kind, most = std::min(S, P)](
                                uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t cos, uintptr_t sin,
                                uintptr_t k_codes, uintptr_t k_scales, uintptr_t v_codes,
                                uintptr_t v_scales, uintptr_t lengths,
                                uintptr_t q_out) -> int64_t {
      KvAppendQuantizedArgs call = kind;
      KvAppendArgs& plain = call.plain;
      plain.lengths = pointer<int64_t>(lengths);
      if (const int64_t b = row_beyond(plain, most); b >= 0) return b;
      set_tensors(plain, q, k, v, cos, sin, q_out);
      call.k_cache.codes = pointer<int8_t>(k_codes);
      call.k_cache.scales = pointer<float>(k_scales);
      call.v_cache.codes = pointer<int8_t>(v_codes);
      call.v_cache.scales = pointer<float>(v_scales);
      launch(&KernelTable::kv_append_quantized, call);
      return -1;
    });
  });

  // A call returns the first row whose length exceeds S, having done nothing then, or -1. `lse` and
  // `lengths` may be null.
  m.def("attention", [](int dtype, const std::array<int64_t, 4>& q_shape,
                        const std::array<int64_t, 4>& k_shape, const Strides& q_strides,
                        const Strides& k_strides, const Strides& v_strides, bool causal,
                        float scale) {
    const auto [B, T, H, D] = q_shape;
    const AttentionArgs kind{DType(dtype), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                             B, T, k_shape[1], H, k_shape[2], D, heads(q_strides),
                             heads(k_strides), heads(v_strides), causal, scale};
    return py::cpp_function([kind](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t lengths,
                                   uintptr_t o, uintptr_t lse) -> int64_t {
      AttentionArgs call = kind;
      call.lengths = pointer<int64_t>(lengths);
      if (const int64_t b = row_beyond(call); b >= 0) return b;
      call.q = pointer<void>(q);
      call.k = pointer<void>(k);
      call.v = pointer<void>(v);
      call.o = pointer<void>(o);
      call.lse = pointer<void>(lse);
      launch(&KernelTable::attention, call);
      return -1;
    });
  });

  // As attention.
  m.def("attention_quantized", [](int dtype, const std::array<int64_t, 4>& q_shape,
                                  const std::array<int64_t, 4>& k_shape, const Strides& q_strides,
                                  const CodedStrides& k_strides, const CodedStrides& v_strides,
                                  bool causal, float scale) {
    const auto [B, T, H, D] = q_shape;
    const AttentionQuantizedArgs kind{
        {DType(dtype), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, B, T, k_shape[1], H,
         k_shape[2], D, heads(q_strides), {}, {}, causal, scale},
        coded(k_strides), coded(v_strides)};
    return py::cpp_function([kind](uintptr_t q, uintptr_t k_codes, uintptr_t k_scales,
                                   uintptr_t v_codes, uintptr_t v_scales, uintptr_t lengths,
                                   uintptr_t o) -> int64_t {
      AttentionQuantizedArgs call = kind;
      call.plain.lengths = pointer<int64_t>(lengths);
      if (const int64_t b = row_beyond(call.plain); b >= 0) return b;
      call.plain.q = pointer<void>(q);
      call.plain.o = pointer<void>(o);
      call.k.codes = pointer<int8_t>(k_codes);
      call.k.scales = pointer<float>(k_scales);
      call.v.codes = pointer<int8_t>(v_codes);
      call.v.scales = pointer<float>(v_scales);
      launch(&KernelTable::attention_quantized, call);
      return -1;
    });
  });

  m.def("linear", [](int dtype, const Layout& layout, int64_t C_in, int64_t C_out) {
    const LinearArgs kind{DType(dtype), nullptr, nullptr, nullptr, rows(layout), C_in, C_out};
    return py::cpp_function([kind](uintptr_t x, uintptr_t weight, uintptr_t y) {
      LinearArgs call = kind;
      call.x = pointer<void>(x);
      call.weight = pointer<void>(weight);
      call.y = pointer<void>(y);
      launch(&KernelTable::linear, call);
    });
  });

  // `offsets` may be null.
  m.def("linear_quantized", [](int dtype, const Layout& layout, int64_t C_in, int64_t C_out,
                               int64_t group_size, int bits) {
    const LinearQuantizedArgs kind{DType(dtype), nullptr, nullptr, nullptr, nullptr, nullptr,
                                   rows(layout), C_in, C_out, group_size, bits};
    return py::cpp_function([kind](uintptr_t x, uintptr_t codes, uintptr_t scales,
                                   uintptr_t offsets, uintptr_t y) {
      LinearQuantizedArgs call = kind;
      call.x = pointer<void>(x);
      call.codes = pointer<uint8_t>(codes);
      call.scales = pointer<f16>(scales);
      call.offsets = pointer<f16>(offsets);
      call.y = pointer<void>(y);
      launch(&KernelTable::linear_quantized, call);
    });
  });

  m.def("matmul", [](int dtype, uintptr_t rows_data, const Layout& rows_layout,
                     bool rows_transposed, uintptr_t lanes_data, const Layout& lanes_layout,
                     bool lanes_transposed, uintptr_t out, bool out_transposed, int64_t R,
                     int64_t L, int64_t K) {
    launch(&KernelTable::matmul, MatmulArgs{DType(dtype),
           {pointer<void>(rows_data), rows(rows_layout), rows_transposed},
           {pointer<void>(lanes_data), rows(lanes_layout), lanes_transposed},
           pointer<void>(out), out_transposed, R, L, K});
  });
}
