// What this machine can do at most: bytes read and copied a second, multiply-adds a second. The
// kernels are judged by these, so the loops here do nothing else. `sink` takes their results for
// the compiler to leave nothing out.
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "simd/amx.h"
#include "simd/simd.h"

namespace llama_fast {
namespace ISA {

// Calls f(part, begin, end) on equal parts of the lines of memory, one a thread.
template <class F> static void for_each_part(const RooflineArgs& a, F&& f) {
  const int64_t lines = a.bytes / 64;
  parallel_for(a.threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      f(i, lines * i / a.threads, lines * (i + 1) / a.threads);
  });
}

// A line of a cache; the compiler reads it with the widest loads of this instruction set.
typedef uint64_t Line __attribute__((vector_size(64)));

void read_memory(const RooflineArgs& a) {
  for_each_part(a, [&](int64_t part, int64_t begin, int64_t end) {
    constexpr int A = 4;  // lines in flight: two read a third slower on Zen 3
    const Line* p = static_cast<const Line*>(a.source);
    Line total[A] = {};
    for (int64_t i = begin; i + A <= end; i += A)
      for (int j = 0; j < A; ++j) total[j] ^= p[i + j];
    for (int j = 1; j < A; ++j) total[0] ^= total[j];
    a.sink[part] = float(total[0][0]);
  });
}

// The C library's memcpy, which knows the best stores of the machine.
void copy_memory(const RooflineArgs& a) {
  for_each_part(a, [&](int64_t, int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(a.target) + 64 * begin,
                static_cast<const char*>(a.source) + 64 * begin, size_t(end - begin) * 64);
  });
}

// `steps` times 12 multiply-adds of whole vectors a thread; 12 hide the latency of two units.
template <class F> static void multiply_add(const RooflineArgs& a, F&& multiply_add_vector) {
  for_each_part(a, [&](int64_t part, int64_t, int64_t) {
    constexpr int A = 12;
    vf x[A];
    for (int j = 0; j < A; ++j) x[j] = set(float(j));
    for (int64_t i = 0; i < a.steps; ++i)
      for (int j = 0; j < A; ++j) x[j] = multiply_add_vector(x[j]);
    for (int j = 1; j < A; ++j) x[0] = x[0] + x[j];
    float lanes[vf::W];
    store(lanes, x[0]);
    a.sink[part] = lanes[0];
  });
}

void multiply_add_f32(const RooflineArgs& a) {
  const vf b = set(0.999f), c = set(0.1f);
  multiply_add(a, [&](vf x) { return fma(x, b, c); });
}

// The instruction that multiplies most bf16 at a time: tiles, or pairs, where there are such.
void multiply_add_bf16(const RooflineArgs& a) {
#if defined(ISA_HAS_TILES)
  for_each_part(a, [&](int64_t part, int64_t, int64_t) {
    alignas(64) bf16 values[2 * TILE_WORDS * TILE_WORDS];
    alignas(64) float sums[TILE_WORDS * TILE_WORDS];
    for (bf16& value : values) from_float(0.01f, value);
    const TileRegisters registers;
    written(values);
    _tile_loadd(4, values, TILE_BYTES);
    _tile_loadd(5, values, TILE_BYTES);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < a.steps; ++i) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(3, sums, TILE_BYTES);
    written(sums);
    a.sink[part] = sums[0];
  });
#elif defined(ISA_HAS_PAIRS)
  bf16 values[2 * vf::W];
  for (bf16& value : values) from_float(0.01f, value);
  const vf b = load_pairs(values);
  multiply_add(a, [&](vf x) { return dot_pairs(b, b, x); });
#else
  multiply_add_f32(a);
#endif
}

}  // namespace ISA
}  // namespace llama_fast
