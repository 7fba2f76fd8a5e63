// Exchanges between the 32 lanes of a warp. All lanes take part, always.
#pragma once

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

}  // namespace pelt
