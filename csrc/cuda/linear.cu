// y = x Wᵀ for at most 16 rows of x and a weight of bfloat16 or float16. See linear.cuh.
#include "linear.cuh"

namespace llama_fast::cuda {

template <class T> struct DenseWeight {
  const T* weight;  // (C_out, C_in) contiguous
  int64_t columns, rows;
  bool aligned_columns;  // every row begins at a multiple of 16 bytes

  struct Raw { Pairs low, high; };
  static constexpr __host__ __device__ int steps(int) { return 4; }

  // The lane's rows: g and g + 8 of the block's.
  const T* low_row = nullptr;
  bool low_valid = false, high_valid = false;
  __device__ __forceinline__ void start(int64_t first_row, int g) {
    low_row = weight + (first_row + g) * columns;
    low_valid = first_row + g < rows;
    high_valid = first_row + g + 8 < rows;
  }

  __device__ __forceinline__ Raw load(int64_t c) const {
    return {load_columns<true>(low_row, c, columns, aligned_columns, low_valid),
            load_columns<true>(low_row + 8 * columns, c, columns, aligned_columns, high_valid)};
  }

  template <int TILES>
  __device__ __forceinline__ void multiply(float (&sum)[TILES][4], const Raw& raw,
                                           const Pairs (&x)[TILES], int64_t) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) cuda::multiply<T>(sum[i], raw.low, raw.high, x[i]);
  }
};

template <class T> static void launch_dense(const Target& target, const LinearArgs& a) {
  const DenseWeight<T> weight{static_cast<const T*>(a.weight), a.C_in, a.C_out,
                              a.C_in % 8 == 0 && aligned({a.weight})};
  launch_linear<T>(target, "linear_fwd", a.x, a.rows, weight, a.y, a.C_in, a.C_out);
}

void linear(const Target& target, const LinearArgs& a) {
  if (a.dtype == DType::bf16) launch_dense<bf16>(target, a);
  else launch_dense<f16>(target, a);
}

}  // namespace llama_fast::cuda
