// What the CUDA kernels take: a call, in the order and the letters of contract.h, the pieces of its
// workspace, and the cut into tiles. launch.cpp fills it in.
#pragma once

#include "common/launch.h"
#include "common/tiling.h"
#include "ops/gated_adapter/call.h"

namespace pelt::gated_adapter {

using namespace pelt::rows;

using Call = CallOf<int>;

constexpr int kBlockT = 64;      // rows of a tile: 16 for each of 4 warps
constexpr int kWeightRows = 64;  // rows that the weights' gradients take at a time
constexpr int kPartsStride = 8;  // elements from row to row of numbers in parts: 16 bytes

// Weights in float32 that the launches behind it take in the activation's type.
struct RoundParams {
  struct Weight {
    const float* from = nullptr;
    void* to = nullptr;
    int64_t count = 0;  // elements, a multiple of 8; 0: nothing to do
  };
  Weight weight[2];
};

constexpr int kGateRows = 16;  // of a sentence, whose gates forward adds up together

struct ForwardParams {
  Call in;
  const void* w_down = nullptr;  // in the activation's type: the call's, or rounded
  const void* w_up = nullptr;

  // With a pooled gate:
  int* arrivals = nullptr;        // [B]: tiles of a sentence whose partial sum is there
  float* gate_partial = nullptr;  // [B, gate_sums, 2]: sum of gates and number of counted rows
  int gate_sums = 0;              // of a sentence

  int64_t residual_shift = 0;  // from an element of x to that of the residual, in elements

  Tiling tiling;
  int wave_tiles = 0;  // see wave_of
};

// For both backward kernels.
struct BackwardParams {
  Call in;
  const void* w_down = nullptr;  // as in forward
  const void* w_up = nullptr;

  // The first leaves for the second:
  void* dh = nullptr;  // [B, S, rank_stride]
  void* a = nullptr;   // [B, S, rank_stride]: factor phi(h); null: nobody wants it
  void* du = nullptr;  // [B, S, D]: d loss / d (W_up phi(h) + b_up), with a post-norm
  // [B, S, kPartsStride], see parts.cuh: the factor of dy after dropout, which is scale g, or 1 with
  // a post-norm, where du is in memory; and kDLogit.
  void* factor_parts = nullptr;
  void* dlogit_parts = nullptr;
  float* row_scalars = nullptr;   // [kRowScalars, B * S]
  float* tile_sums = nullptr;     // [kTileSums, tiles]
  float* norm_partial = nullptr;  // [norm slots, norms, 2, D]: a slot's sums, of weight and bias
  int* norm_slots = nullptr;      // the number of blocks, whose slots they are, but see below
  // Blocks of the first leave for each other, with a pooled gate:
  int* arrivals = nullptr;        // [B]: tiles of a sentence whose partial sum is there
  float* gate_partial = nullptr;  // [tiles, 2]: a tile's sum of dots and number of counted rows
  // Blocks of the second leave for each other:
  int* tickets = nullptr;           // [weight tiles]; null: there are no splits
  float* weight_partial = nullptr;  // [weight tiles, splits, partial_floats]

  Tiling tiling;
  int wave_tiles = 0;   // of the first kernel, see wave_of
  int rank_stride = 0;  // R, up to a whole number of 16-byte vectors; ranks beyond R are zero

  // Of the second kernel:
  Tiling weight_tiling;  // in tiles of kWeightRows; groups only where weights differ by sample
  int members = 1;       // of the larger bank
  int column_tiles = 0;  // weight tiles are members by rank tiles by column tiles
  int rank_tiles = 0;
  int splits = 1;        // parts of the rows that are summed by different blocks
  int layer_blocks = 0;  // that add up what is not of weights: members of norms by column tiles
};

// What the first backward kernel leaves for the second of each row.
enum RowScalar {
  kDot,     // dy . dropout(post_norm(u)), which the gradients of gate and scale are sums of
  kLogit,   // of a learned gate: w . x + b
  kDLogit,  // and its gradient
  kMean,    // of x, with a pre-norm
  kRstd,
  kRowScalars
};

// What it leaves of each tile.
enum TileSum {
  kGatedDot,   // the sum over rows of gate dot: the gradient of scale
  kDLogitSum,  // of dlogit: that of the gate's bias
  kTileSums
};

// Elements of the arrays above.
PELT_HOST_DEVICE float* row_scalar(const BackwardParams& p, RowScalar which, int64_t row) {
  return p.row_scalars + which * rows_of(p.in) + row;
}

PELT_HOST_DEVICE float* tile_sum(const BackwardParams& p, TileSum which, int tile) {
  return p.tile_sums + static_cast<int64_t>(which) * p.tiling.tiles + tile;
}

PELT_HOST_DEVICE int64_t weight_tiles_of(const BackwardParams& p) {
  return static_cast<int64_t>(p.members) * p.rank_tiles * p.column_tiles;
}

PELT_HOST_DEVICE int norms_of(const Call& in) {
  return (has_pre_norm(in) ? 1 : 0) + (has_post_norm(in) ? 1 : 0);
}

// Where weight and bias of a member's norm begin.
PELT_HOST_DEVICE int64_t pre_norm_at(const Call& in, int64_t member) {
  return has_pre_norm_bank(in) ? member * in.D : 0;
}
PELT_HOST_DEVICE int64_t post_norm_at(const Call& in, int64_t member) {
  return has_post_norm_bank(in) ? member * in.D : 0;
}

// Samples have norms of their own: then a tile has a slot of norm_partial, not a block.
PELT_HOST_DEVICE bool leaves_norms_by_tile(const Call& in) {
  return (has_pre_norm_bank(in) && has_down_index_per_sample(in)) ||
         (has_post_norm_bank(in) && has_up_index_per_sample(in));
}

// Of the larger bank of norms.
PELT_HOST_DEVICE int norm_members_of(const Call& in) {
  const int before = has_pre_norm_bank(in) ? in.M : 1, after = has_post_norm_bank(in) ? in.M_up : 1;
  return before > after ? before : after;
}

// The launches; launch.cpp puts them in order.
void launch_round_sm80(const RoundParams& params, DType dtype, Stream stream);
void launch_fwd_sm80(const ForwardParams& params);
void launch_fwd_general_sm80(const ForwardParams& params);
void launch_bwd_rows_sm80(const BackwardParams& params);
void launch_bwd_general_sm80(const BackwardParams& params);
void launch_bwd_weights_sm80(const BackwardParams& params);

}  // namespace pelt::gated_adapter
