// The kernels of one instruction set, in one table.
#include "kernels.h"
#include "simd/simd.h"

namespace llama_fast {
namespace ISA {

void attention(const AttentionArgs&);
void rms_norm(const RmsNormArgs&);
void add_rms_norm(const AddRmsNormArgs&);
void swiglu(const SwigluArgs&);
void rope(const RopeArgs&);
void kv_append(const KvAppendArgs&);
void linear(const LinearArgs&);
void linear_quantized(const LinearQuantizedArgs&);
void matmul(const MatmulArgs&);
void read_memory(const CeilingArgs&);
void copy_memory(const CeilingArgs&);
void multiply_add_f32(const CeilingArgs&);
void multiply_add_bf16(const CeilingArgs&);

const KernelTable kernels = {
    .attention = attention,
    .rms_norm = rms_norm,
    .add_rms_norm = add_rms_norm,
    .swiglu = swiglu,
    .rope = rope,
    .kv_append = kv_append,
    .linear = linear,
    .linear_quantized = linear_quantized,
    .matmul = matmul,
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
};

}  // namespace ISA
}  // namespace llama_fast
