// The kernels of one instruction set, in one table.
#include "kernels.h"

namespace llama_fast {
namespace ISA {

void attention(const AttentionArgs&);
void rms_norm(const RmsNormArgs&);

const KernelTable kernels = {
    attention,
    rms_norm,
};

}  // namespace ISA
}  // namespace llama_fast
