// Tiles without padding: a row's 16-byte vectors are exchanged by the row's number, so that the 8
// rows of an ldmatrix fall into different banks. A tile then takes no more memory than its
// elements, and more tiles are in flight at a time than with padded rows.
//
//   kColumns = 64:  row 0   0 1 2 3 4 5 6 7      vector v of row r is at v ^ (r % 8)
//                   row 1   1 0 3 2 5 4 7 6
//                   row 2   2 3 0 1 6 7 4 5
#pragma once

#include "cuda/fragment.cuh"

namespace pelt {

// The offset in elements of a 16-byte vector of a tile with kColumns 2-byte elements in a row.
template <int kColumns>
__device__ __forceinline__ int swizzled(int row, int vector) {
  constexpr int kVectors = kColumns / 8;
  static_assert(kColumns % 8 == 0 && (kVectors & (kVectors - 1)) == 0,
                "a row is a power of two of 16-byte vectors");
  // Several narrow rows lie in one pass over the 128 bytes of the banks, and are exchanged alike.
  constexpr int kRowsOfBanks = kVectors < 8 ? 8 / kVectors : 1;
  constexpr int kPlaces = kVectors < 8 ? kVectors : 8;
  return row * kColumns + (vector ^ (row / kRowsOfBanks % kPlaces)) * 8;
}

// The offset at which a lane of ldmatrix reads a fragment whose first element is (row, column) of a
// tile; both are multiples of 16. Other fragments follow from it without swizzled(), which is five
// operations: 16 rows further down it is 16 * kColumns more, and from column 0 (or any column that
// has none of c's bits) to column c, a multiple of 16, it is the offset ^ c.

// Of A, from a tile [m, k].
template <int kColumns>
__device__ __forceinline__ int lane_offset_of_a(int row, int column) {
  return swizzled<kColumns>(row + lane_index() % 16, column / 8 + lane_index() / 16);
}

// Of two neighbouring B, columns 0-7 and 8-15 of n, from a tile [n, k].
template <int kColumns>
__device__ __forceinline__ int lane_offset_of_b_pair(int n, int k) {
  const int lane = lane_index();
  return swizzled<kColumns>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2);
}

// Of two neighbouring B, from a tile [k, n], which is read transposed.
template <int kColumns>
__device__ __forceinline__ int lane_offset_of_b_pair_transposed(int k, int n) {
  return lane_offset_of_a<kColumns>(k, n);
}

// Loads A from kBytes behind the lane's own address in shared memory.
template <int kBytes>
__device__ __forceinline__ FragmentA load_a_at(uint32_t of_lane) {
  FragmentA a;
  ldmatrix_x4_at<kBytes>(a.r, of_lane);
  return a;
}

// Loads two neighbouring B from kBytes behind the lane's own address in shared memory.
template <bool kIsTransposed, int kBytes>
__device__ __forceinline__ void load_b_pair_at(FragmentB (&b)[2], uint32_t of_lane) {
  uint32_t r[4];
  if constexpr (kIsTransposed) {
    ldmatrix_x4_trans_at<kBytes>(r, of_lane);
  } else {
    ldmatrix_x4_at<kBytes>(r, of_lane);
  }
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

}  // namespace pelt
