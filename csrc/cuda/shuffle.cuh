// Exchanges between the 32 lanes of a warp. All lanes take part, always.
#pragma once

#include <cstdint>

namespace pelt {

template <class T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit registers");
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

template <class T>
__device__ __forceinline__ T shfl(T value, int source_lane) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit registers");
  return __shfl_sync(0xffffffffu, value, source_lane);
}

__device__ __forceinline__ bool vote_any(bool holds) { return __any_sync(0xffffffffu, holds); }

// Bit i is lane i's.
__device__ __forceinline__ uint32_t vote_ballot(bool holds) {
  return __ballot_sync(0xffffffffu, holds);
}

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

}  // namespace pelt
