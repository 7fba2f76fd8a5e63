// Fragments: the operands of mma_m16n8k16, loaded from row-major tiles in shared memory.
//
// Tiles are padded by 8 elements per row (kTilePad): rows are then 16 bytes out of step with the
// 128 bytes of the banks, so that the 8 rows of an ldmatrix fall into different banks.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/index.cuh"
#include "cuda/ldmatrix.cuh"
#include "cuda/mma.cuh"

namespace pelt {

constexpr int kTilePad = 8;

struct FragmentA {  // [16, 16]
  uint32_t r[4];
};

struct FragmentB {  // [16, 8]
  uint32_t r[2];
};

struct FragmentD {  // [16, 8], float32
  float r[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  // Where element i of this lane stands in the [16, 8] tile.
  __device__ __forceinline__ static int row(int i) { return lane_index() / 4 + 8 * (i / 2); }
  __device__ __forceinline__ static int column(int i) { return 2 * (lane_index() % 4) + i % 2; }
};

template <class T>
__device__ __forceinline__ void multiply_add(FragmentD& d, const FragmentA& a, const FragmentB& b) {
  mma_m16n8k16<T>(d.r, a.r, b.r);
}

// Loads A from a tile [m, k]: `tile` points at its element (0, 0), rows are `stride` elements
// apart. In all of these a lane passes the address of one row of 8 elements; which one follows from
// the order in which ldmatrix gives its four matrices to the registers of a fragment.
template <class T>
__device__ __forceinline__ FragmentA load_a(const T* tile, int stride) {
  FragmentA a;
  const int lane = lane_index();
  ldmatrix_x4(a.r, tile + (lane % 16) * stride + lane / 16 * 8);
  return a;
}

// Loads A from a tile that holds its transpose, [k, m].
template <class T>
__device__ __forceinline__ FragmentA load_a_transposed(const T* tile, int stride) {
  FragmentA a;
  const int lane = lane_index();
  ldmatrix_x4_trans(a.r, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  return a;
}

// Loads two neighbouring B, columns 0-7 and 8-15, from a tile [n, k] (a weight as it lies in
// memory): one ldmatrix for both.
template <class T>
__device__ __forceinline__ void load_b_pair(FragmentB (&b)[2], const T* tile, int stride) {
  uint32_t r[4];
  const int lane = lane_index();
  ldmatrix_x4(r, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

// Loads one B, columns 0-7, from a tile [n, k].
template <class T>
__device__ __forceinline__ FragmentB load_b(const T* tile, int stride) {
  FragmentB b;
  const int lane = lane_index();
  ldmatrix_x2(b.r, tile + (lane % 8) * stride + lane / 8 % 2 * 8);
  return b;
}

// Loads two neighbouring B, columns 0-7 and 8-15, from a tile [k, n].
template <class T>
__device__ __forceinline__ void load_b_pair_transposed(FragmentB (&b)[2], const T* tile,
                                                       int stride) {
  uint32_t r[4];
  const int lane = lane_index();
  ldmatrix_x4_trans(r, tile + (lane % 16) * stride + lane / 16 * 8);
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

}  // namespace pelt
