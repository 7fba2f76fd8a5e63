// A value that the compiler must take as it comes.
#pragma once

namespace pelt {

// The same number, but unknown to the optimiser: what is computed from it is computed here, at each
// turn of a loop, instead of being kept in registers all along. For kernels whose accumulators need
// those registers more than the loop needs the few integer operations.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace pelt
