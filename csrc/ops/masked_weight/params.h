// masked_weight: y = mask ⊙ W with W = w0 + beta u v, and mask = 1 at the `keep` highest scores
// |W| + alpha1 a b + alpha2 (row 1ᵀ + 1 colᵀ).
//
// What the CUDA kernels take: a call, in the order and the letters of contract.h, and pieces of its
// workspace.
#pragma once

#include "common/launch.h"
#include "ops/masked_weight/contract.h"

namespace pelt::masked_weight {

using Call = NativeCall<Contract, int>;

// Tiles that the layout of workspaces has to know of.
constexpr int kWarps = 8;  // of a block
constexpr int kTileRows = 32;
constexpr int kTileColumns = 128;
// Rows that a block of backward takes one tile after the other: so many, or fewer where the blocks
// would leave multiprocessors without work.
constexpr int kMostBandRows = 4 * kTileRows;

PELT_HOST_DEVICE int64_t entries_of(const Call& in) {
  return static_cast<int64_t>(in.Dout) * in.Din;
}

// A threshold is found in three digits of the scores' bits, from the top.
constexpr int kDigits = 3;
constexpr int kBins = 2048;

struct ForwardParams {
  Call in;                   // its y is W at first
  int* counts = nullptr;     // [kDigits, kBins]: how many keys have a digit; zero at first
  int* arrivals = nullptr;   // blocks that have come to the barriers of the grid; zero at first
  int* equal = nullptr;      // for each warp of the grid: its keys that are the threshold
  uint32_t* keys = nullptr;  // [Dout, Din], numbers in the order of the scores
};

struct BackwardParams {
  Call in;
  // Sums over one block's columns or rows; the second kernel adds them in order. Those of row and
  // col are one more rank of a and b, whose other factor is 1.
  float* du_partial = nullptr;  // [column tiles, Dout, R]
  float* dv_partial = nullptr;  // [row bands, R, Din]
  float* da_partial = nullptr;  // [column tiles, Dout, R2 + 1]
  float* db_partial = nullptr;  // [row bands, R2 + 1, Din]
  int column_tiles = 0;
  int row_bands = 0;
  int band_rows = kMostBandRows;
};

// One for each architecture's files; launch.cpp chooses. Forward's grid is resident as a whole.
int forward_blocks_sm80(const Call& call);
void launch_forward_sm80(const ForwardParams& params, int blocks);
void launch_backward_sm80(const BackwardParams& params);

}  // namespace pelt::masked_weight
