// Exchanges between the 32 lanes of a warp. All lanes must take part, so none of these may stand in
// a branch that only some lanes take.
#pragma once

#include <cstdint>

namespace pelt {

// The value of lane `lane ^ lane_mask`.
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit registers");
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The value of lane source_lane.
template <class T>
__device__ __forceinline__ T shfl(T value, int source_lane) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit registers");
  return __shfl_sync(0xffffffffu, value, source_lane);
}

// True in every lane if it holds in any.
__device__ __forceinline__ bool vote_any(bool holds) { return __any_sync(0xffffffffu, holds); }

// Bit i tells whether it holds in lane i.
__device__ __forceinline__ uint32_t vote_ballot(bool holds) {
  return __ballot_sync(0xffffffffu, holds);
}

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

}  // namespace pelt
