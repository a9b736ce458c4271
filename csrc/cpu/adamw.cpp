// One step of AdamW in one pass, as llama_fast/ops/adamw.py defines it: each element of the parameter,
// its gradient and its moments is read once, and written once where it changes.
//
// Elements go through the memory in pieces; how these are shared among threads changes no bit, since
// random bits are those of an element's number. 8-bit moments have a scale for each block of 256, so a
// block is made whole in a buffer first, and rounded by its largest moments then.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "simd/random.h"

namespace llama_fast {
namespace ISA {

constexpr int64_t BLOCK = 256;   // of a scale
constexpr int64_t PIECE = 4096;  // elements that a thread takes at a time; whole blocks

// X's elements in the order in which load2 has those of P.
template <class P, class X, class Width> static inline auto load_as(const X* p, Width width) {
  if constexpr (std::is_same_v<P, X> || !std::is_same_v<Width, Pair>) {
    return load(p, width);
  } else if constexpr (std::is_same_v<X, float>) {
    return load_beside<P>(p, width);
  } else {
    return vf2{load(p), load(p + vf::W)};
  }
}

// Returns √v.
template <class V> static inline V step(const AdamwArgs& a, V& p, V g, V& m, V& v) {
  g = g * set(a.grad_scale);
  m = m + (g - m) * set(a.towards_grad);
  v = v * set(a.beta2) + g * g * set(a.of_square);
  const V root = sqrt(v);
  p = p * set(a.decay) - m * set(a.step_size) / (set(a.eps) + root * set(a.correction));
  return root;
}

// Elements `at` … of param, which begin at p.
template <class P, class V, class Width>
static inline void store_param(const AdamwArgs& a, P* p, V x, int64_t at, Width width) {
  if constexpr (std::is_same_v<P, bf16>) {
    if (a.stochastic) return store_random(p, x, at, a.param_key, width);
  }
  store(p, x, width);
}

template <class P, class G> static void in_floats(const AdamwArgs& a, int64_t begin, int64_t count) {
  P* param = static_cast<P*>(a.param) + begin;
  const G* grad = static_cast<const G*>(a.grad) + begin;
  float* exp_avg = static_cast<float*>(a.exp_avg) + begin;
  float* exp_avg_sq = static_cast<float*>(a.exp_avg_sq) + begin;
  for_each_pair(count, [&](int64_t i, auto width) {
    auto p = load(param + i, width);
    auto m = load_as<P>(exp_avg + i, width), v = load_as<P>(exp_avg_sq + i, width);
    step(a, p, load_as<P>(grad + i, width), m, v);
    store_param(a, param + i, p, begin + i, width);
    store_beside<P>(exp_avg + i, m, width);
    store_beside<P>(exp_avg_sq + i, v, width);
  });
}

// What an 8-bit value q stands for is scale · sign(q) (q / 127)² of m, scale · (q / 255)⁴ of v
// (llama_fast/ops/quantized_moments.py). Loops that the compiler makes vectors of.
static inline void dequantize(const int8_t* q, float scale, float* m) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    const float x = float(q[i]);
    m[i] = x * __builtin_fabsf(x) * (1 / (127.f * 127.f)) * scale;
  }
}
static inline void dequantize(const uint8_t* q, float scale, float* v) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    const float square = float(q[i]) * float(q[i]) * (1 / (255.f * 255.f));
    v[i] = square * square * scale;
  }
}

// The largest magnitude of a block; NaN or infinity where it holds one.
static inline float largest(const float* x) {
  constexpr int A = 4;  // in flight at a time
  vf most[A], wrong[A];
  for (int j = 0; j < A; ++j) most[j] = wrong[j] = zero();
  for (int64_t i = 0; i < BLOCK; i += A * vf::W) {
    for (int j = 0; j < A; ++j) {
      const vf y = load(x + i + j * vf::W);
      most[j] = max(most[j], max(y, zero() - y));
      wrong[j] = fma(y, zero(), wrong[j]);  // 0, or NaN
    }
  }
  for (int j = 1; j < A; ++j) {
    most[0] = max(most[0], most[j]);
    wrong[0] = wrong[0] + wrong[j];
  }
  return max_of(most[0]) + sum(wrong[0]);
}
// The scale's inverse; that of the least normal number where it is less, or NaN.
static inline float inverse(float scale) {
  return 1.f / (scale > 1.17549435e-38f ? scale : 1.17549435e-38f);
}

// `up` is what is added before a value is cut: a random share of 1, or half of it.
static inline void quantize(const float* m, float scale, const float* up, int8_t* q) {
  const float unit = inverse(scale);
  for (int64_t i = 0; i < BLOCK; ++i) {
    float x = __builtin_floorf(__builtin_sqrtf(__builtin_fabsf(m[i]) * unit) * 127.f + up[i]);
    x = x < 127.f ? x : 127.f;
    q[i] = int8_t(int(m[i] < 0.f ? -x : x));
  }
}
static inline void quantize_roots(const float* root, float scale, const float* up, uint8_t* q) {
  const float unit = __builtin_sqrtf(inverse(scale));
  for (int64_t i = 0; i < BLOCK; ++i) {
    float x = __builtin_floorf(__builtin_sqrtf(root[i] * unit) * 255.f + up[i]);
    x = x < 255.f ? x : 255.f;
    const float least = root[i] > 0.f ? 1.f : 0.f;
    q[i] = uint8_t(int(x > least ? x : least));
  }
}

template <class P, class G> static void in_8_bits(const AdamwArgs& a, int64_t begin, int64_t n) {
  alignas(64) float m[BLOCK], v[BLOCK], root[BLOCK], up_m[BLOCK], up_v[BLOCK];
  // Of a last block that is not whole the rest are zeros.
  alignas(64) int8_t q_m[BLOCK] = {};
  alignas(64) uint8_t q_v[BLOCK] = {};
  P* param = static_cast<P*>(a.param) + begin;
  const G* grad = static_cast<const G*>(a.grad) + begin;
  int8_t* exp_avg = static_cast<int8_t*>(a.exp_avg) + begin;
  uint8_t* exp_avg_sq = static_cast<uint8_t*>(a.exp_avg_sq) + begin;
  float& m_scale = a.exp_avg_scale[begin / BLOCK];
  float& v_scale = a.exp_avg_sq_scale[begin / BLOCK];
  const size_t count = size_t(n);
  std::memcpy(q_m, exp_avg, count);
  std::memcpy(q_v, exp_avg_sq, count);
  dequantize(q_m, m_scale, m);
  dequantize(q_v, v_scale, v);
  for_each_pair(n, [&](int64_t i, auto width) {
    auto value = load(param + i, width);
    auto first = load_as<P>(m + i, width), second = load_as<P>(v + i, width);
    const auto its_root = step(a, value, load_as<P>(grad + i, width), first, second);
    store_param(a, param + i, value, begin + i, width);
    store_beside<P>(m + i, first, width);
    store_beside<P>(v + i, second, width);
    store_beside<P>(root + i, its_root, width);
  });
  for (int64_t i = n; i < BLOCK; ++i) m[i] = v[i] = root[i] = 0.f;
  m_scale = largest(m);
  v_scale = largest(v);
  if (a.stochastic) {
    alignas(64) uint32_t words[BLOCK];
    for (int64_t i = 0; i < BLOCK; i += vf::W) {
      const vu some = random_words(begin + i, a.moments_key);
      std::memcpy(words + i, &some, sizeof(some));
    }
    for (int64_t i = 0; i < BLOCK; ++i) {
      up_m[i] = float(int32_t(words[i] & 0xffffu)) * 0x1p-16f;
      up_v[i] = float(int32_t(words[i] >> 16)) * 0x1p-16f;
    }
  } else {
    std::fill(up_m, up_m + BLOCK, 0.5f);
    std::fill(up_v, up_v + BLOCK, 0.5f);
  }
  quantize(m, m_scale, up_m, q_m);
  quantize_roots(root, v_scale, up_v, q_v);
  std::memcpy(exp_avg, q_m, count);
  std::memcpy(exp_avg_sq, q_v, count);
}

template <class P, class G> static void adamw_of(const AdamwArgs& a) {
  const int64_t pieces = (a.n + PIECE - 1) / PIECE;
  parallel_for_then_pieces(pieces, 1 + ELEMENTS_OF_A_THREAD / PIECE, 16, [&](int64_t first,
                                                                            int64_t last) {
    const int64_t end = last * PIECE < a.n ? last * PIECE : a.n;
    const int64_t part = a.exp_avg_scale ? BLOCK : PIECE;
    for (int64_t begin = first * PIECE; begin < end; begin += part) {
      const int64_t count = end - begin < part ? end - begin : part;
      a.exp_avg_scale ? in_8_bits<P, G>(a, begin, count) : in_floats<P, G>(a, begin, count);
    }
  });
}

void adamw(const AdamwArgs& a) {
  const auto with_grad = [&](auto p, auto g) { adamw_of<decltype(p), decltype(g)>(a); };
  const auto with_param = [&](auto p) {
    a.grad_dtype == DType::f32 ? with_grad(p, float{}) : with_grad(p, bf16{});
  };
  a.dtype == DType::f32 ? with_param(float{}) : with_param(bf16{});
}

}  // namespace ISA
}  // namespace llama_fast
