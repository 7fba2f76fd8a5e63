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

// Where a lane of ldmatrix reads a fragment whose first element is (row, column) of a tile, a row
// being a multiple of 16 and a column of 16. To go on by 16 rows add 16 * kColumns; to go on to the
// column c, a multiple of 16, from column 0 (or from any column that has none of c's bits) take the
// offset ^ c: one operation, where swizzled() would be five.

// A from a tile [m, k].
template <int kColumns>
__device__ __forceinline__ int lane_offset_of_a(int row, int column) {
  return swizzled<kColumns>(row + lane_index() % 16, column / 8 + lane_index() / 16);
}

// Two neighbouring B, columns 0-7 and 8-15 of n, from a tile [n, k].
template <int kColumns>
__device__ __forceinline__ int lane_offset_of_b_pair(int n, int k) {
  const int lane = lane_index();
  return swizzled<kColumns>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2);
}

// Two from a tile [k, n], which is read transposed.
template <int kColumns>
__device__ __forceinline__ int lane_offset_of_b_pair_transposed(int k, int n) {
  return lane_offset_of_a<kColumns>(k, n);
}

template <class T>
__device__ __forceinline__ FragmentA load_a_at(const T* of_lane) {
  FragmentA a;
  ldmatrix_x4(a.r, of_lane);
  return a;
}

template <bool kIsTransposed, class T>
__device__ __forceinline__ void load_b_pair_at(FragmentB (&b)[2], const T* of_lane) {
  uint32_t r[4];
  if constexpr (kIsTransposed) {
    ldmatrix_x4_trans(r, of_lane);
  } else {
    ldmatrix_x4(r, of_lane);
  }
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

}  // namespace pelt
