// The kernels of one instruction set, in one table.
#include "kernels.h"
#include "simd/amx.h"
#include "simd/simd.h"

namespace llama_fast {
namespace ISA {

void attention(const AttentionArgs&);
void attention_backward(const AttentionBackwardArgs&);
void rms_norm(const RmsNormArgs&);
void rms_norm_backward(const RmsNormBackwardArgs&);
void add_rms_norm(const AddRmsNormArgs&);
void adamw(const AdamwArgs&);
void swiglu(const SwigluArgs&);
void swiglu_backward(const SwigluBackwardArgs&);
void rope(const RopeArgs&);
void kv_append(const KvAppendArgs&);
void gemv(const LinearArgs&);
void linear_quantized(const LinearQuantizedArgs&);
void gemm(const GemmArgs&);
void read_memory(const RooflineArgs&);
void copy_memory(const RooflineArgs&);
void multiply_add_f32(const RooflineArgs&);
void multiply_add_bf16(const RooflineArgs&);

// Of a step of the loops of roofline.cpp.
constexpr int64_t F32_FLOPS = 12 * vf::W * 2;
#ifdef ISA_HAS_TILES
constexpr int64_t BF16_FLOPS = 4 * TILE_WORDS * TILE_WORDS * 2 * TILE_WORDS * 2;
#elif defined(ISA_HAS_PAIRS)
constexpr int64_t BF16_FLOPS = 2 * F32_FLOPS;
#else
constexpr int64_t BF16_FLOPS = F32_FLOPS;
#endif

const KernelTable kernels = {
    .attention = attention,
    .attention_backward = attention_backward,
    .rms_norm = rms_norm,
    .rms_norm_backward = rms_norm_backward,
    .add_rms_norm = add_rms_norm,
    .adamw = adamw,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .rope = rope,
    .kv_append = kv_append,
    .gemv = gemv,
    .linear_quantized = linear_quantized,
    .gemm = gemm,
    .read_memory = read_memory,
    .copy_memory = copy_memory,
    .multiply_add_f32 = multiply_add_f32,
    .multiply_add_bf16 = multiply_add_bf16,
    .lanes = vf::W,
#ifdef ISA_HAS_PAIRS
    .bf16_pairs = true,
#else
    .bf16_pairs = false,
#endif
    .f32_flops = F32_FLOPS,
    .bf16_flops = BF16_FLOPS,
};

}  // namespace ISA
}  // namespace llama_fast
