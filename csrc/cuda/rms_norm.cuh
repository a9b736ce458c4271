// RMSNorm forward and backward, with the residual's addition or without: rms_norm.cu and
// add_rms_norm.cu launch them.
//
// Forward    r = 1 / sqrt(mean(x²) + eps); y = round(round(x·r) · weight)
// Backward   dx = r·g·w - x · r³ · mean(g·w·x) (+ grad_total); dw = Σ over rows of g·x·r
//
// A row belongs to blockDim.x threads and lies in their registers between the sum and its use, so
// that memory is read once; rows that are too long, or not of whole 16-byte vectors, are read twice,
// the second time mostly from a cache. Sums are in float, and in double for float32 rows,
// whose results would else be a unit or two from what a sum in another order gives.
#pragma once

#include <common/launch.cuh>
#include <common/pdl.cuh>

#include "common/numeric.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace llama_fast::cuda {

// PER_THREAD value of the kernels that take rows of any length and keep none of it.
constexpr int ANY_LENGTH = 0;

// In what is summed.
template <class T> using Wide = std::conditional_t<std::is_same_v<T, float>, double, float>;

template <class T, int VEC, bool ADD>
__device__ __forceinline__ Pack<T, VEC> row_element(const T* x, const T* residual, T* total,
                                                    int64_t c) {
  Pack<T, VEC> sum = load<VEC>(x + c);
  if constexpr (ADD) {
    const Pack<T, VEC> r = load<VEC>(residual + c);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum.v[i] = from_float<T>(to_float(sum.v[i]) + to_float(r.v[i]));
    store(total + c, sum);
  }
  return sum;
}

template <class T, int VEC>
__device__ __forceinline__ void add_squares(const Pack<T, VEC>& x, Wide<T>& sum) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const Wide<T> xw = to_float(x.v[i]);
    sum = fma(xw, xw, sum);
  }
}

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> normalised(const Pack<T, VEC>& x, float r,
                                                   const Pack<T, VEC>& weight) {
  Pack<T, VEC> y;
#pragma unroll
  for (int i = 0; i < VEC; ++i)
    y.v[i] = from_float<T>(to_float(from_float<T>(to_float(x.v[i]) * r)) * to_float(weight.v[i]));
  return y;
}

// blockDim (threads of a row, rows of a block); C is a multiple of VEC and, unless PER_THREAD is
// ANY_LENGTH, at most blockDim.x · PER_THREAD · VEC.
template <class T, int VEC, int PER_THREAD, bool ADD>
__global__ void __launch_bounds__(PER_THREAD == 1 || PER_THREAD == 2 ? 256 : 1024)
rms_norm_fwd_kernel(const T* x, const T* residual, const T* __restrict__ weight, T* y, T* total,
                    Rows x_rows, Rows residual_rows, int64_t N, int64_t C, float eps) {
  auto& parts = shared_memory<SumParts<Wide<T>, 1>>();
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= N) return;
  x += offset(x_rows, row);
  y += row * C;
  if constexpr (ADD) {
    residual += offset(residual_rows, row);
    total += row * C;
  }
  const int64_t first = int64_t(threadIdx.x) * VEC, step = int64_t(blockDim.x) * VEC;
  Wide<T> sum[1] = {};
  if constexpr (PER_THREAD == ANY_LENGTH) {
    for (int64_t c = first; c < C; c += step)
      add_squares(row_element<T, VEC, ADD>(x, residual, total, c), sum[0]);
    block_sum(sum, parts, 0);
    const float r = 1 / sqrt(sum[0] / C + eps);
    const T* kept = ADD ? total : x;  // the thread's own elements of total
    for (int64_t c = first; c < C; c += step)
      store(y + c, normalised(load<VEC>(kept + c), r, load<VEC>(weight + c)));
  } else {
    Pack<T, VEC> kept[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int64_t c = first + i * step;
      if (c >= C) break;
      kept[i] = row_element<T, VEC, ADD>(x, residual, total, c);
      add_squares(kept[i], sum[0]);
    }
    block_sum(sum, parts, 0);
    const float r = 1 / sqrt(sum[0] / C + eps);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int64_t c = first + i * step;
      if (c >= C) break;
      store(y + c, normalised(kept[i], r, load<VEC>(weight + c)));
    }
  }
}

template <class T, int VEC>
__device__ __forceinline__ void add_products(const Pack<T, VEC>& x, const Pack<T, VEC>& g,
                                             const Pack<T, VEC>& w, Wide<T> (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const Wide<T> xw = to_float(x.v[i]), gw = to_float(g.v[i]);
    sums[0] = fma(xw, xw, sums[0]);
    sums[1] = fma(gw * to_float(w.v[i]), xw, sums[1]);
  }
}

template <class T, int VEC, bool ADD>
__device__ __forceinline__ Pack<T, VEC> row_gradient(const Pack<T, VEC>& x, const Pack<T, VEC>& g,
                                                     const Pack<T, VEC>& w, Wide<T> r, Wide<T> s,
                                                     const T* grad_total, int64_t c) {
  Pack<T, VEC> dx, more;
  if constexpr (ADD) more = load<VEC>(grad_total + c);
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const Wide<T> gw = Wide<T>(to_float(g.v[i])) * to_float(w.v[i]);
    Wide<T> d = fma(Wide<T>(-to_float(x.v[i])), s, r * gw);  // the terms may nearly cancel
    if constexpr (ADD) d += to_float(more.v[i]);
    dx.v[i] = from_float<T>(float(d));
  }
  return dx;
}

// Block p takes the rows p, p + gridDim.x, … and leaves its share of dw in dw_parts[p, :].
template <class T, int VEC, int PER_THREAD, bool ADD>
__global__ void __launch_bounds__(256, 1)
rms_norm_bwd_kernel(const T* grad, const T* grad_total, const T* x, const T* __restrict__ weight,
                    T* dx, Wide<T>* dw_parts, Rows grad_rows, Rows grad_total_rows, Rows x_rows,
                    int64_t N, int64_t C, float eps) {
  auto& parts = shared_memory<SumParts<Wide<T>, 2>>();
  constexpr int KEPT = PER_THREAD == ANY_LENGTH ? 1 : PER_THREAD;
  const int64_t first = int64_t(threadIdx.x) * VEC, step = int64_t(blockDim.x) * VEC;
  Wide<T>* dw = dw_parts + blockIdx.x * C;
  Pack<T, VEC> w[KEPT], x_kept[KEPT], g_kept[KEPT];
  Wide<T> dw_kept[KEPT][VEC] = {};
  if constexpr (PER_THREAD != ANY_LENGTH) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (first + i * step < C) w[i] = load<VEC>(weight + first + i * step);
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < N; row += gridDim.x, ++turn) {
    const T* x_row = x + offset(x_rows, row);
    const T* g_row = grad + offset(grad_rows, row);
    const T* total_row = nullptr;
    if constexpr (ADD) total_row = grad_total + offset(grad_total_rows, row);
    T* dx_row = dx + row * C;
    Wide<T> sums[2] = {};
    if constexpr (PER_THREAD == ANY_LENGTH) {
      for (int64_t c = first; c < C; c += step)
        add_products(load<VEC>(x_row + c), load<VEC>(g_row + c), load<VEC>(weight + c), sums);
    } else {
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int64_t c = first + i * step;
        if (c >= C) break;
        x_kept[i] = load<VEC>(x_row + c);
        g_kept[i] = load<VEC>(g_row + c);
        add_products(x_kept[i], g_kept[i], w[i], sums);
      }
    }
    block_sum(sums, parts, turn);
    const Wide<T> r = 1 / sqrt(sums[0] / C + eps);
    const Wide<T> s = r * r * r * (sums[1] / C);
    if constexpr (PER_THREAD == ANY_LENGTH) {
      for (int64_t c = first; c < C; c += step) {
        const auto xs = load<VEC>(x_row + c), g = load<VEC>(g_row + c), ws = load<VEC>(weight + c);
        store(dx_row + c, row_gradient<T, VEC, ADD>(xs, g, ws, r, s, total_row, c));
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          dw[c + i] = fma(Wide<T>(to_float(g.v[i])), to_float(xs.v[i]) * r,
                          turn ? dw[c + i] : Wide<T>(0));
      }
    } else {
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int64_t c = first + i * step;
        if (c >= C) break;
        store(dx_row + c,
              row_gradient<T, VEC, ADD>(x_kept[i], g_kept[i], w[i], r, s, total_row, c));
#pragma unroll
        for (int j = 0; j < VEC; ++j)
          dw_kept[i][j] = fma(Wide<T>(to_float(g_kept[i].v[j])),
                              to_float(x_kept[i].v[j]) * r, dw_kept[i][j]);
      }
    }
  }
  if constexpr (PER_THREAD != ANY_LENGTH) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
#pragma unroll
      for (int j = 0; j < VEC; ++j)
        if (first + i * step < C) dw[first + i * step + j] = dw_kept[i][j];
  }
}

// dw (C,) = the sum of dw_parts (parts, C) over the parts. blockDim (32, SLICES): a warp reads 32
// neighbouring columns, each slice a share of the parts.
constexpr int SLICES = 8;

template <class T>
__global__ void __launch_bounds__(WARP * SLICES)
rms_norm_bwd_sum_kernel(const Wide<T>* __restrict__ dw_parts, T* dw, int64_t parts, int64_t C) {
  auto& sums = shared_memory<Wide<T>[SLICES][WARP]>();
  const int64_t c = int64_t(blockIdx.x) * WARP + threadIdx.x;
  Wide<T> sum = 0;
  if (c < C)
    for (int64_t p = threadIdx.y; p < parts; p += SLICES) sum += dw_parts[p * C + c];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= C) return;
  for (int i = 1; i < SLICES; ++i) sum += sums[i][threadIdx.x];
  dw[c] = from_float<T>(float(sum));
}

// ---- on the host ----

// Vectors that a thread of a row keeps, and the threads of a row.
struct RowShape {
  int per_thread;
  unsigned threads;
};

// Few threads with some vectors each have more loads under way than many with one.
inline RowShape row_shape(int64_t vectors, unsigned most_threads) {
  for (const int per_thread : {1, 2, 4}) {
    const int64_t threads = ceil_div(ceil_div(vectors, per_thread), WARP) * WARP;
    if (threads <= (per_thread < 4 ? 256 : most_threads)) {
      return {per_thread, static_cast<unsigned>(threads ? threads : WARP)};
    }
  }
  return {ANY_LENGTH, most_threads};
}

// Calls `with` with the PER_THREAD of the shape as a constant.
template <class With> void with_per_thread(int per_thread, With with) {
  if (per_thread == 1) with(std::integral_constant<int, 1>{});
  else if (per_thread == 2) with(std::integral_constant<int, 2>{});
  else if (per_thread == 4) with(std::integral_constant<int, 4>{});
  else with(std::integral_constant<int, ANY_LENGTH>{});
}

template <bool ADD>
void launch_norm(const Target& target, const char* name, DType dtype, const void* x,
                 const void* residual, const void* weight, void* y, void* total,
                 const Rows& x_rows, const Rows& residual_rows, int64_t C, float eps) {
  const int64_t N = x_rows.count();
  if (N == 0 || C == 0) return;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto kernel, unsigned threads) {
      const unsigned rows = threads == WARP ? 4 : 1;
      const Launch how{name, {unsigned(ceil_div(N, rows))}, {threads, rows},
                       sizeof(SumParts<Wide<T>, 1>), true};
      launch(target, how, kernel, static_cast<const T*>(x), static_cast<const T*>(residual),
             static_cast<const T*>(weight), static_cast<T*>(y), static_cast<T*>(total), x_rows,
             residual_rows, N, C, eps);
    };
    constexpr int VEC = VECTOR<T>;
    if (C % VEC == 0 && whole(VEC, x_rows) && (!ADD || whole(VEC, residual_rows)) &&
        aligned({x, residual, weight, y, total})) {
      const RowShape shape = row_shape(C / VEC, 1024);
      with_per_thread(shape.per_thread, [&](auto per_thread) {
        run(rms_norm_fwd_kernel<T, VEC, per_thread(), ADD>, shape.threads);
      });
    } else {
      run(rms_norm_fwd_kernel<T, 1, ANY_LENGTH, ADD>, C <= 256 ? WARP : 256);
    }
  });
}

template <bool ADD>
void launch_norm_backward(const Target& target, const char* name, const char* sum_name,
                          const RmsNormBackwardArgs& a) {
  const int64_t N = a.x_rows.count(), C = a.C;
  if (C == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto kernel, unsigned threads) {
      const Launch how{name, {unsigned(a.partials)}, {threads}, sizeof(SumParts<Wide<T>, 2>)};
      launch(target, how, kernel, static_cast<const T*>(a.grad),
             static_cast<const T*>(a.grad_total), static_cast<const T*>(a.x),
             static_cast<const T*>(a.weight), static_cast<T*>(a.dx),
             static_cast<Wide<T>*>(a.dw_partials), a.grad_rows,
             a.grad_total_rows, a.x_rows, N, C, a.eps);
    };
    constexpr int VEC = VECTOR<T>;
    if (N == 0) {
      // No part of dw is written, and none is read.
    } else if (C % VEC == 0 && whole(VEC, a.x_rows) && whole(VEC, a.grad_rows) &&
               (!ADD || whole(VEC, a.grad_total_rows)) &&
               aligned({a.grad, a.grad_total, a.x, a.weight, a.dx})) {
      const RowShape shape = row_shape(C / VEC, 256);
      with_per_thread(shape.per_thread, [&](auto per_thread) {
        run(rms_norm_bwd_kernel<T, VEC, per_thread(), ADD>, shape.threads);
      });
    } else {
      run(rms_norm_bwd_kernel<T, 1, ANY_LENGTH, ADD>, C <= 256 ? 64 : 256);
    }
    const Launch how{sum_name, {unsigned(ceil_div(C, WARP))}, {WARP, SLICES},
                     sizeof(Wide<T>[SLICES][WARP])};
    launch(target, how, rms_norm_bwd_sum_kernel<T>, static_cast<const Wide<T>*>(a.dw_partials),
           static_cast<T*>(a.dw), a.partials, C);
  });
}

}  // namespace llama_fast::cuda
