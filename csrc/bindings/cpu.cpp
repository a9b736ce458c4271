// llama_fast._cpu: the CPU kernels with pointers and sizes as integers. Python has checked every
// argument before it calls; nothing is checked twice here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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
#ifdef LLAMA_FAST_HAS_AVX2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    usable.emplace_back("avx512_bf16", &avx512_bf16::kernels);
  if (avx512) usable.emplace_back("avx512", &avx512::kernels);
  if (avx2) usable.emplace_back("avx2", &avx2::kernels);
#endif
  usable.emplace_back("scalar", &scalar::kernels);
  return usable;
}

const auto usable = usable_isas();
auto chosen = usable.front();

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

// Of q, k or v: b, t, h, then D's, which is 1
using Strides = std::array<int64_t, 4>;
HeadStrides heads(const Strides& s) { return {s[0], s[1], s[2]}; }

// Kernels run without the interpreter lock, so that other Python threads go on.
template <class Args> void launch(void (*KernelTable::*kernel)(const Args&), const Args& args) {
  py::gil_scoped_release unlocked;
  (chosen.second->*kernel)(args);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "llama_fast's CPU kernels; called by llama_fast.backends.cpu only";

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto& isa : usable) names.push_back(isa.first);
    return names;
  }, "The instruction sets that can be chosen here, best first.");
  m.def("isa", [] { return chosen.first; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"));

  // Returns the first row whose length exceeds S, having done nothing then, or -1.
  m.def("attention", [](int dtype, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
                        uintptr_t lengths, const std::array<int64_t, 4>& q_shape,
                        const std::array<int64_t, 4>& k_shape, const Strides& q_stride,
                        const Strides& k_stride, const Strides& v_stride, bool causal,
                        float scale) -> int64_t {
    const auto [B, T, H, D] = q_shape;
    const int64_t S = k_shape[1], K = k_shape[2];
    const auto* length = pointer<const int64_t>(lengths);
    for (int64_t b = 0; length && b < B; ++b)
      if (length[b] > S) return b;
    launch(&KernelTable::attention, AttentionArgs{DType(dtype), pointer<void>(q), pointer<void>(k),
           pointer<void>(v), pointer<void>(o), length, B, T, S, H, K, D, heads(q_stride),
           heads(k_stride), heads(v_stride), causal, scale});
    return -1;
  });
  m.def("rms_norm", [](int dtype, uintptr_t x, uintptr_t weight, uintptr_t y, const Layout& layout,
                       int64_t C, float eps) {
    launch(&KernelTable::rms_norm, RmsNormArgs{DType(dtype), pointer<void>(x),
           pointer<void>(weight), pointer<void>(y), rows(layout), C, eps});
  });
}
