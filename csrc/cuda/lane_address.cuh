// A loop over fragments of one tile with padded rows, or of tiles at constant distances, needs one
// address of shared memory, the one that the lane passes for the first fragment: load_a_at and
// load_b_pair_at (swizzle.cuh) take the others as constant numbers of bytes from there.
#pragma once

#include "cuda/index.cuh"
#include "cuda/memory.cuh"

namespace pelt {

// Of A from a tile [m, k], as in load_a.
template <class T>
__device__ __forceinline__ uint32_t lane_address_of_a(const T* tile, int stride) {
  const int lane = lane_index();
  return shared_address(tile + (lane % 16) * stride + lane / 16 * 8);
}

// Of two neighbouring B from a tile [n, k], as in load_b_pair.
template <class T>
__device__ __forceinline__ uint32_t lane_address_of_b_pair(const T* tile, int stride) {
  const int lane = lane_index();
  return shared_address(tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

// Of two neighbouring B from a tile [k, n], which is read transposed: they stand as A does.
template <class T>
__device__ __forceinline__ uint32_t lane_address_of_b_pair_transposed(const T* tile, int stride) {
  return lane_address_of_a(tile, stride);
}

}  // namespace pelt
