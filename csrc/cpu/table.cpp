// The kernels of one instruction set, in one table.
#include "kernels.h"

namespace llama_fast {
namespace ISA {

void attention(const AttentionArgs&);
void rms_norm(const RmsNormArgs&);
void add_rms_norm(const AddRmsNormArgs&);
void swiglu(const SwigluArgs&);
void rope(const RopeArgs&);
void kv_append(const KvAppendArgs&);

const KernelTable kernels = {
    attention,
    rms_norm,
    add_rms_norm,
    swiglu,
    rope,
    kv_append,
};

}  // namespace ISA
}  // namespace llama_fast
