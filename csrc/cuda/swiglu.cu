// SwiGLU's elementwise part: h = round(silu(gate)) · up, with silu(z) = z / (1 + e^-z); its gradient,
// with s = 1 / (1 + e^-gate):  d_gate = g · up · s · (1 + gate · (1 - s)),  d_up = g · gate · s.
//
// Each thread takes 16 bytes of a row; nothing is read twice, so the grid only has to be large.
#include <common/launch.cuh>
#include <common/pdl.cuh>

#include "common/numeric.cuh"
#include "common/rows.cuh"
#include "swiglu.cuh"

namespace llama_fast::cuda {

constexpr int THREADS = 128;

// A plain quotient: for the approximate one, a denominator above 2^126 gives 0.
template <class T> __device__ __forceinline__ float sigmoid(float z) {
  return 1.0f / (1.0f + exponential<T>(-z));
}

template <class T, int VEC>
__global__ void __launch_bounds__(THREADS)
swiglu_fwd_kernel(const T* gate, const T* up, T* h, Rows gate_rows, Rows up_rows, int64_t N,
                  int64_t F) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t f = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * VEC;
  if (f >= F) return;
  for (int64_t row = blockIdx.y; row < N; row += gridDim.y) {
    const auto z = load<VEC>(gate + offset(gate_rows, row) + f);
    const auto u = load<VEC>(up + offset(up_rows, row) + f);
    Pack<T, VEC> y;
#pragma unroll
    for (int i = 0; i < VEC; ++i) y.v[i] = swiglu_of(z.v[i], u.v[i]);
    store(h + row * F + f, y);
  }
}

template <class T, int VEC>
__global__ void __launch_bounds__(THREADS)
swiglu_bwd_kernel(const T* grad, const T* gate, const T* up, T* d_gate, T* d_up, Rows grad_rows,
                  Rows gate_rows, Rows up_rows, int64_t N, int64_t F) {
  const int64_t f = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * VEC;
  if (f >= F) return;
  for (int64_t row = blockIdx.y; row < N; row += gridDim.y) {
    const auto g = load<VEC>(grad + offset(grad_rows, row) + f);
    const auto z = load<VEC>(gate + offset(gate_rows, row) + f);
    const auto u = load<VEC>(up + offset(up_rows, row) + f);
    Pack<T, VEC> dz, du;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float gf = to_float(g.v[i]), zf = to_float(z.v[i]), s = sigmoid<T>(zf);
      dz.v[i] = from_float<T>(gf * to_float(u.v[i]) * s * (1.0f + zf * (1.0f - s)));
      du.v[i] = from_float<T>(gf * zf * s);
    }
    store(d_gate + row * F + f, dz);
    store(d_up + row * F + f, du);
  }
}

static Launch over_rows(const char* kernel, int64_t N, int64_t F, int vector) {
  constexpr int64_t MOST_ROWS = 65535;  // of gridDim.y
  return {kernel,
          {unsigned(ceil_div(F, THREADS * vector)), unsigned(N < MOST_ROWS ? N : MOST_ROWS)},
          {THREADS}};
}

void swiglu(const Target& target, const SwigluArgs& a) {
  const int64_t N = a.gate_rows.count(), F = a.F;
  if (N == 0 || F == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int VEC = VECTOR<T>;
    const bool wide = F % VEC == 0 && whole(VEC, a.gate_rows) && whole(VEC, a.up_rows) &&
                      aligned({a.gate, a.up, a.h});
    Launch how = over_rows("swiglu_fwd", N, F, wide ? VEC : 1);
    how.overlaps = true;
    launch(target, how,
           wide ? swiglu_fwd_kernel<T, VEC> : swiglu_fwd_kernel<T, 1>,
           static_cast<const T*>(a.gate), static_cast<const T*>(a.up), static_cast<T*>(a.h),
           a.gate_rows, a.up_rows, N, F);
  });
}

void swiglu_backward(const Target& target, const SwigluBackwardArgs& a) {
  const int64_t N = a.gate_rows.count(), F = a.F;
  if (N == 0 || F == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int VEC = VECTOR<T>;
    const bool wide = F % VEC == 0 && whole(VEC, a.grad_rows) && whole(VEC, a.gate_rows) &&
                      whole(VEC, a.up_rows) && aligned({a.grad, a.gate, a.up, a.d_gate, a.d_up});
    launch(target, over_rows("swiglu_bwd", N, F, wide ? VEC : 1),
           wide ? swiglu_bwd_kernel<T, VEC> : swiglu_bwd_kernel<T, 1>,
           static_cast<const T*>(a.grad), static_cast<const T*>(a.gate),
           static_cast<const T*>(a.up), static_cast<T*>(a.d_gate), static_cast<T*>(a.d_up),
           a.grad_rows, a.gate_rows, a.up_rows, N, F);
  });
}

}  // namespace llama_fast::cuda
