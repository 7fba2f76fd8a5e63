// What the CUDA kernels take: a call, in the order and the letters of contract.h, the pieces of its
// workspace, and the cut into tiles. launch.cpp fills it in.
#pragma once

#include "common/launch.h"
#include "common/tiling.h"
#include "ops/gated_adapter/call.h"

namespace pelt::gated_adapter {

using namespace pelt::rows;

using Call = CallOf<int>;

constexpr int kBlockT = 64;  // rows of a tile: 16 for each of 4 warps

struct ForwardParams {
  Call in;

  // With a pooled gate:
  int* arrivals = nullptr;        // [B]: tiles of a sentence whose partial sum is there
  float* gate_partial = nullptr;  // [tiles, 2]: a tile's sum of gates and number of counted rows

  Tiling tiling;
  int wave_tiles = 0;  // see wave_of
};

// For both backward kernels.
struct BackwardParams {
  Call in;

  // The first leaves for the second:
  void* dh = nullptr;             // [B, S, R]
  void* du = nullptr;             // [B, S, D]: d loss / d (W_up phi(h) + b_up), with a post-norm
  float* row_scalars = nullptr;   // [kRowScalars, B * S]
  float* norm_partial = nullptr;  // [tiles, warps, norms, 2, D]: a warp's sums, of weight and bias
  // Blocks of the first leave for each other, with a pooled gate:
  int* arrivals = nullptr;        // [B]: tiles of a sentence whose partial sum is there
  float* gate_partial = nullptr;  // [tiles, 2]: a tile's sum of dots and number of counted rows
  // Blocks of the second leave for each other:
  int* tickets = nullptr;           // [weight tiles]
  float* weight_partial = nullptr;  // [weight tiles, splits, partial_floats]

  Tiling tiling;
  int wave_tiles = 0;    // of the first kernel, see wave_of
  int members = 1;       // of the larger bank
  int column_tiles = 0;  // weight tiles are members by column tiles by rank tiles
  int rank_tiles = 0;
  int splits = 1;  // parts of the rows that are summed by different blocks
};

// What the first backward kernel leaves for the second of each row.
enum RowScalar {
  kFactor,  // of dy after dropout: scale g; 1 with a post-norm, where du is in memory
  kDot,     // dy . dropout(post_norm(u)), which the gradients of gate and scale are sums of
  kLogit,   // of a learned gate: w . x + b
  kDLogit,  // and its gradient
  kMean,    // of x, with a pre-norm
  kRstd,
  kRowScalars
};

PELT_HOST_DEVICE int norms_of(const Call& in) {
  return (has_pre_norm(in) ? 1 : 0) + (has_post_norm(in) ? 1 : 0);
}

// The launches; launch.cpp puts them in order.
void launch_fwd_sm80(const ForwardParams& params);
void launch_bwd_rows_sm80(const BackwardParams& params);
void launch_bwd_weights_sm80(const BackwardParams& params);

}  // namespace pelt::gated_adapter
