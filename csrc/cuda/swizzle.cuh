// Tiles without padding: a row's 16-byte vectors change places by the row's number, so that the 8
// rows of an ldmatrix fall into different banks. A tile is then exactly its elements, and more of
// them are on the way at a time than with padded rows.
#pragma once

#include "cuda/fragment.cuh"

namespace pelt {

// Where a 16-byte vector of a tile with kColumns 2-byte elements in a row begins, in elements.
template <int kColumns>
__device__ __forceinline__ int swizzled(int row, int vector) {
  constexpr int kVectors = kColumns / 8;
  static_assert(kColumns % 8 == 0 && (kVectors & (kVectors - 1)) == 0,
                "a row is a power of two of 16-byte vectors");
  // Narrow rows share the 128 bytes of the banks and change places together.
  constexpr int kRowsOfBanks = kVectors < 8 ? 8 / kVectors : 1;
  constexpr int kPlaces = kVectors < 8 ? kVectors : 8;
  return row * kColumns + (vector ^ (row / kRowsOfBanks % kPlaces)) * 8;
}

// As the loads of fragment.cuh, from a swizzled tile; (row, column) is the fragment's first element
// and a multiple of 16 or 8.
template <int kColumns, class T>
__device__ __forceinline__ FragmentA load_a_swizzled(const T* tile, int row, int column) {
  FragmentA a;
  const int lane = lane_index();
  ldmatrix_x4(a.r, tile + swizzled<kColumns>(row + lane % 16, column / 8 + lane / 16));
  return a;
}

// Two neighbouring B, columns 0-7 and 8-15, from a tile [n, k].
template <int kColumns, class T>
__device__ __forceinline__ void load_b_pair_swizzled(FragmentB (&b)[2], const T* tile, int n,
                                                     int k) {
  uint32_t r[4];
  const int lane = lane_index();
  ldmatrix_x4(r, tile + swizzled<kColumns>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

// Two from a tile [k, n].
template <int kColumns, class T>
__device__ __forceinline__ void load_b_pair_transposed_swizzled(FragmentB (&b)[2], const T* tile,
                                                                int k, int n) {
  uint32_t r[4];
  const int lane = lane_index();
  ldmatrix_x4_trans(r, tile + swizzled<kColumns>(k + lane % 16, n / 8 + lane / 16));
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

}  // namespace pelt
