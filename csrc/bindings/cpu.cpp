// llama_fast._cpu: the CPU kernels with pointers and sizes as integers. Python has checked every
// argument before it calls; nothing is checked twice here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

// n0, n1, n2, stride0, stride1, stride2
using Layout = std::array<int64_t, 6>;
Rows rows(const Layout& l) { return {l[0], l[1], l[2], l[3], l[4], l[5]}; }

// Of a (B, T, heads, D) tensor; the last one is 1.
using Strides = std::array<int64_t, 4>;
HeadStrides heads(const Strides& s) { return {s[0], s[1], s[2]}; }
Heads heads(uintptr_t data, int64_t count, const Strides& s) {
  return {pointer<void>(data), count, heads(s)};
}

// Codes and scales of a cache in 8 bits, and the strides of codes (B, S, K, D) and scales (B, S, K).
using Coded = std::array<uintptr_t, 2>;
using CodedStrides = std::pair<Strides, std::array<int64_t, 3>>;
QuantizedHeads coded(const Coded& at, const CodedStrides& s) {
  return {pointer<int8_t>(at[0]), heads(s.first), pointer<float>(at[1]),
          {s.second[0], s.second[1], s.second[2]}};
}

// Asks the system to back fresh memory by huge pages. A large output is mapped anew for each call,
// and to fault it in by pages of 4 kB takes longer than to compute it.
void prefer_huge_pages(uintptr_t address, uint64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t begin = (address + PAGE - 1) & ~(PAGE - 1), end = (address + bytes) & ~(PAGE - 1);
  // Where the system refuses, everything works as without.
  if (begin < end) (void)madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
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

  // Returns the first row whose length exceeds S, having done nothing then, or -1.
  m.def("attention", [](int dtype, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
                        uintptr_t lse, uintptr_t lengths, const std::array<int64_t, 4>& q_shape,
                        const std::array<int64_t, 4>& k_shape, const Strides& q_stride,
                        const Strides& k_stride, const Strides& v_stride, bool causal,
                        float scale) -> int64_t {
    const auto [B, T, H, D] = q_shape;
    const int64_t S = k_shape[1], K = k_shape[2];
    const auto* length = pointer<const int64_t>(lengths);
    for (int64_t b = 0; length && b < B; ++b)
      if (length[b] > S) return b;
    launch(&KernelTable::attention, AttentionArgs{DType(dtype), pointer<void>(q), pointer<void>(k),
           pointer<void>(v), pointer<void>(o), pointer<void>(lse), length, B, T, S, H, K, D, heads(q_stride),
           heads(k_stride), heads(v_stride), causal, scale});
    return -1;
  });

  // As attention.
  m.def("attention_quantized", [](int dtype, uintptr_t q, const Coded& k, const Coded& v,
                                  uintptr_t o, uintptr_t lengths,
                                  const std::array<int64_t, 4>& q_shape,
                                  const std::array<int64_t, 4>& k_shape, const Strides& q_stride,
                                  const CodedStrides& k_strides, const CodedStrides& v_strides,
                                  bool causal, float scale) -> int64_t {
    const auto [B, T, H, D] = q_shape;
    const int64_t S = k_shape[1], K = k_shape[2];
    const auto* length = pointer<const int64_t>(lengths);
    for (int64_t b = 0; length && b < B; ++b)
      if (length[b] > S) return b;
    launch(&KernelTable::attention_quantized, AttentionQuantizedArgs{
           {DType(dtype), pointer<void>(q), nullptr, nullptr, pointer<void>(o), nullptr, length, B,
            T, S, H, K, D, heads(q_stride), {}, {}, causal, scale},
           coded(k, k_strides), coded(v, v_strides)});
    return -1;
  });

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

  m.def("rms_norm", [](int dtype, uintptr_t x, uintptr_t weight, uintptr_t y, const Layout& layout,
                       int64_t C, float eps) {
    launch(&KernelTable::rms_norm, RmsNormArgs{DType(dtype), pointer<void>(x),
           pointer<void>(weight), pointer<void>(y), rows(layout), C, eps});
  });

  m.def("add_rms_norm", [](int dtype, uintptr_t x, uintptr_t residual, uintptr_t weight,
                           uintptr_t y, uintptr_t total, const Layout& x_layout,
                           const Layout& residual_layout, int64_t C, float eps) {
    launch(&KernelTable::add_rms_norm, AddRmsNormArgs{DType(dtype), pointer<void>(x),
           pointer<void>(residual), pointer<void>(weight), pointer<void>(y), pointer<void>(total),
           rows(x_layout), rows(residual_layout), C, eps});
  });

  m.def("swiglu", [](int dtype, uintptr_t gate, uintptr_t up, uintptr_t h,
                     const Layout& gate_layout, const Layout& up_layout, int64_t F) {
    launch(&KernelTable::swiglu, SwigluArgs{DType(dtype), pointer<void>(gate), pointer<void>(up),
           pointer<void>(h), rows(gate_layout), rows(up_layout), F});
  });

  m.def("rope", [](int dtype, uintptr_t q, const Strides& q_strides, uintptr_t k,
                   const Strides& k_strides, uintptr_t q_out, uintptr_t k_out, uintptr_t cos,
                   int64_t cos_stride_b, int64_t cos_stride_t, uintptr_t sin, int64_t sin_stride_b,
                   int64_t sin_stride_t, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D,
                   bool interleaved) {
    launch(&KernelTable::rope, RopeArgs{DType(dtype), heads(q, H, q_strides),
           heads(k, K, k_strides), pointer<void>(q_out), pointer<void>(k_out), pointer<float>(cos),
           pointer<float>(sin), cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t, B, T, D,
           interleaved});
  });

  // Returns the first row that would end beyond the cache or the tables, having done nothing then,
  // or -1.
  m.def("kv_append", [](int dtype, uintptr_t q, const Strides& q_strides, uintptr_t k,
                        const Strides& k_strides, uintptr_t v, const Strides& v_strides,
                        uintptr_t q_out, uintptr_t cos, int64_t cos_stride, uintptr_t sin,
                        int64_t sin_stride, uintptr_t k_cache, const Strides& k_cache_strides,
                        uintptr_t v_cache, const Strides& v_cache_strides, uintptr_t lengths,
                        int64_t lengths_stride, int64_t B, int64_t T, int64_t S, int64_t P,
                        int64_t H, int64_t K, int64_t D, bool interleaved) -> int64_t {
    const auto* length = pointer<const int64_t>(lengths);
    for (int64_t b = 0; b < B; ++b)
      if (length[b * lengths_stride] > std::min(S, P)) return b;
    launch(&KernelTable::kv_append, KvAppendArgs{DType(dtype), heads(q, H, q_strides),
           heads(k, K, k_strides), heads(v, K, v_strides), pointer<void>(q_out),
           pointer<float>(cos), pointer<float>(sin), cos_stride, sin_stride,
           heads(k_cache, K, k_cache_strides), heads(v_cache, K, v_cache_strides),
           length, lengths_stride, B, T, D, interleaved});
    return -1;
  });

  // As kv_append.
  m.def("kv_append_quantized", [](int dtype, uintptr_t q, const Strides& q_strides, uintptr_t k,
                                  const Strides& k_strides, uintptr_t v, const Strides& v_strides,
                                  uintptr_t q_out, uintptr_t cos, int64_t cos_stride,
                                  uintptr_t sin, int64_t sin_stride, const Coded& k_cache,
                                  const CodedStrides& k_cache_strides, const Coded& v_cache,
                                  const CodedStrides& v_cache_strides, uintptr_t lengths,
                                  int64_t lengths_stride, int64_t B, int64_t T, int64_t S,
                                  int64_t P, int64_t H, int64_t K, int64_t D,
                                  bool interleaved) -> int64_t {
    const auto* length = pointer<const int64_t>(lengths);
    for (int64_t b = 0; b < B; ++b)
      if (length[b * lengths_stride] > std::min(S, P)) return b;
    launch(&KernelTable::kv_append_quantized, KvAppendQuantizedArgs{
           {DType(dtype), heads(q, H, q_strides), heads(k, K, k_strides), heads(v, K, v_strides),
            pointer<void>(q_out), pointer<float>(cos), pointer<float>(sin), cos_stride, sin_stride,
            {}, {}, length, lengths_stride, B, T, D, interleaved},
           coded(k_cache, k_cache_strides), coded(v_cache, v_cache_strides)});
    return -1;
  });

  m.def("linear", [](int dtype, uintptr_t x, uintptr_t weight, uintptr_t y, const Layout& layout,
                     int64_t C_in, int64_t C_out) {
    launch(&KernelTable::linear, LinearArgs{DType(dtype), pointer<void>(x), pointer<void>(weight),
           pointer<void>(y), rows(layout), C_in, C_out});
  });

  m.def("linear_quantized", [](int dtype, uintptr_t x, uintptr_t codes, uintptr_t scales,
                               uintptr_t offsets, uintptr_t y, const Layout& layout, int64_t C_in,
                               int64_t C_out, int64_t group_size, int bits) {
    launch(&KernelTable::linear_quantized, LinearQuantizedArgs{DType(dtype), pointer<void>(x),
           pointer<uint8_t>(codes), pointer<f16>(scales), pointer<f16>(offsets), pointer<void>(y),
           rows(layout), C_in, C_out, group_size, bits});
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
