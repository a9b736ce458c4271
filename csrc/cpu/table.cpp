// The kernels of one instruction set, in one table.
#include "kernels.h"

namespace llama_fast {
namespace ISA {

void rms_norm(const RmsNormArgs&);

const KernelTable kernels = {
    rms_norm,
};

}  // namespace ISA
}  // namespace llama_fast
