// Tiles of W and of a b, made from the factors: what forward and backward share.
//
// A block of 8 warps takes kTileRows rows by kTileColumns columns. A warp has 4 neighbouring rows;
// a lane has of each the columns lane, lane + 32, ...: neighbouring lanes touch neighbouring
// elements, whatever the row's alignment, and no size has to be a multiple of anything.
#pragma once

#include "cuda/device.cuh"
#include "ops/masked_weight/params.h"

namespace pelt::masked_weight {
namespace {

constexpr int kThreads = 32 * kWarps;
constexpr int kRowsEach = kTileRows / kWarps;    // of a warp
constexpr int kColumnsEach = kTileColumns / 32;  // of a lane
constexpr int kRankChunk = 16;                   // of factors in shared memory at a time
constexpr int kColumnStride = kTileColumns + 4;  // rows of tiles start in different banks
constexpr int kRankStride = kRankChunk + 4;

// A stretch of the ranks of two factors.
struct FactorTiles {
  alignas(16) float left[kTileRows * kRankStride];      // [kTileRows, kRankChunk] of u or a
  alignas(16) float right[kRankChunk * kColumnStride];  // [kRankChunk, kTileColumns] of v or b
};

// A left and a right factor of `rank` ranks. With `has_ones` there is one more, of ones on both
// sides: sums over whole rows and columns are products with it.
struct Factors {
  Parameter left;   // [Dout, rank]
  Parameter right;  // [rank, Din]
  int rank;
  bool has_ones;

  __device__ __forceinline__ int ranks() const { return rank + (has_ones ? 1 : 0); }
};

// Where a tile lies in the matrix; rows and columns past its end are 0 in every tile.
struct Place {
  int row;
  int column;
};

using TileValues = float[kRowsEach][kColumnsEach];

__device__ __forceinline__ int tile_row(int i) { return warp_index() * kRowsEach + i; }
__device__ __forceinline__ int tile_column(int j) { return lane_index() + 32 * j; }

template <class T>
__device__ __forceinline__ float load_parameter(const Parameter& p, int64_t i) {
  return p.is_float32 ? static_cast<const float*>(p.data)[i]
                      : to_float(static_cast<const T*>(p.data)[i]);
}

// The ranks from `first` on; what is not there is 0.
template <class T>
__device__ __forceinline__ void load_factors(const Call& in, const Factors& f, const Place& at,
                                             int first, FactorTiles& s) {
  for (int i = thread_index(); i < kTileRows * kRankChunk; i += kThreads) {
    const int r = i / kRankChunk, k = i % kRankChunk, rank = first + k;
    float value = 0.0f;
    if (at.row + r < in.Dout && rank < f.rank) {
      value = load_parameter<T>(f.left, static_cast<int64_t>(at.row + r) * f.rank + rank);
    } else if (at.row + r < in.Dout && rank < f.ranks()) {
      value = 1.0f;
    }
    s.left[r * kRankStride + k] = value;
  }
  for (int i = thread_index(); i < kRankChunk * kTileColumns; i += kThreads) {
    const int k = i / kTileColumns, c = i % kTileColumns, rank = first + k;
    float value = 0.0f;
    if (at.column + c < in.Din && rank < f.rank) {
      value = load_parameter<T>(f.right, static_cast<int64_t>(rank) * in.Din + at.column + c);
    } else if (at.column + c < in.Din && rank < f.ranks()) {
      value = 1.0f;
    }
    s.right[k * kColumnStride + c] = value;
  }
}

// product = left right on the tile. Every thread of the block comes here.
template <class T>
__device__ __forceinline__ void multiply(const Call& in, const Factors& f, const Place& at,
                                         FactorTiles& s, TileValues& product) {
  for (int i = 0; i < kRowsEach; ++i) {
    for (int j = 0; j < kColumnsEach; ++j) product[i][j] = 0.0f;
  }
  for (int first = 0; first < f.ranks(); first += kRankChunk) {
    // All threads have multiplied what the tiles held before.
    sync_threads();
    load_factors<T>(in, f, at, first, s);
    // A thread multiplies rows and columns that others have loaded.
    sync_threads();
    const int count = f.ranks() - first < kRankChunk ? f.ranks() - first : kRankChunk;
    for (int k = 0; k < count; ++k) {
      float right[kColumnsEach];
      // Kept for all rows of the thread; the left value below is the same for the whole warp.
      for (int j = 0; j < kColumnsEach; ++j) {
        right[j] = s.right[k * kColumnStride + tile_column(j)];
      }
      for (int i = 0; i < kRowsEach; ++i) {
        const float left = s.left[tile_row(i) * kRankStride + k];
        for (int j = 0; j < kColumnsEach; ++j) product[i][j] += left * right[j];
      }
    }
  }
}

// Calls visit(i, j, flat index) for this thread's elements of a tile that the matrix has.
template <class Visit>
__device__ __forceinline__ void for_elements(const Call& in, const Place& at, Visit&& visit) {
  for (int i = 0; i < kRowsEach; ++i) {
    const int row = at.row + tile_row(i);
    for (int j = 0; j < kColumnsEach; ++j) {
      const int column = at.column + tile_column(j);
      if (row < in.Dout && column < in.Din) {
        visit(i, j, static_cast<int64_t>(row) * in.Din + column);
      }
    }
  }
}

// x + factor y, rounded twice, as the formula has it: nvcc would make one fused operation of them,
// and where two scores are nearly equal another mask.
__device__ __forceinline__ float add_scaled(float x, float factor, float y) {
  return __fadd_rn(x, __fmul_rn(factor, y));
}

// W = w0 + beta u v on the tile.
template <class T>
__device__ __forceinline__ void update_weight(const Call& in, const Place& at, FactorTiles& s,
                                              TileValues& w) {
  multiply<T>(in, {in.parameter(kU), in.parameter(kV), in.R, false}, at, s, w);
  for_elements(in, at, [&](int i, int j, int64_t index) {
    w[i][j] = add_scaled(to_float(in.input_as<T>(kW0)[index]), in.beta, w[i][j]);
  });
}

}  // namespace
}  // namespace pelt::masked_weight
