// How bulk copies and matrix instructions swizzle addresses of shared memory.
#pragma once

#include <cstdint>

namespace cuda_host {

// Chunks of 16 bytes within rows of 16 << bits: the `bits` bits above the chunk's own three … go into
// the chunk's number, so that a column of chunks lies in different banks.
inline uint32_t swizzled(uint32_t address, int bits) {
  const uint32_t mask = ((1u << bits) - 1) << 4;
  return address ^ (address >> 3 & mask);
}

}  // namespace cuda_host
