// Which versions of CUDA meet on this machine. 13020 stands for 13.2.
#pragma once

namespace llama_fast::cuda {

// That of the runtime in this module.
int runtime_version();
// The latest that the machine's driver serves; 0 where there is none, or it does not say.
int driver_version();

}  // namespace llama_fast::cuda
