// The configurations that exist, for the kernels that are compiled for each of them, the launchers
// that choose the first one that fits, and why_not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/type_list.h"
#include "ops/gated_adapter/options.h"

namespace pelt::gated_adapter {

template <class C>
constexpr bool fits(DType dtype, int64_t R) {
  return DTypeOf<typename C::T>::value == dtype && R <= C::kRanks;
}

template <class C>
bool serves(const Call& in) {
  return fits<C>(in.dtype, in.R) && C::Options::serve(in);
}

// ---- forward ----

constexpr int kPad = 8;  // elements behind each row of a tile, see cuda/fragment.cuh

// The listed kernels of forward: dtype, ranks, rows of a tile. In the first product a warp has one or
// two tiles of 16 rows, a part of the ranks, and half of each chunk's columns: its partner's sums over
// the other half are added in the end. In the second one it has 16 columns and all ranks. So what
// is loaded from shared memory, which limits these kernels, serves several products of a warp.
// How a sum over columns is cut does not depend on the tile's height: what a call gives for a row
// does not depend on how many rows there are.
template <class T_, int kRanks_, int kTileRows_>
struct StreamConfig {
  using T = T_;
  using Options = Usual;
  static constexpr int kRanks = kRanks_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kWarps = kTileRows > 16 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kTileRows > 32 ? 2 : 1;              // of a warp
  static constexpr int kBesides = kWarps * kRowTiles * 16 / kTileRows;  // warps that share rows
  static constexpr int kHalves = kRanks > 64 ? 1 : 2;                   // of a chunk's columns
  static constexpr int kRankWarps = kBesides / kHalves;
  static constexpr int kRankTiles = kRanks / 8 / kRankWarps;  // of a warp, 8 ranks each
  static constexpr int kColumnTiles = kChunk / 8 / kBesides;
  // Elements from row to row of a chunk of rows or of W_down, and of h or a chunk of W_up.
  static constexpr int kRowStride = kChunk + kPad;
  static constexpr int kRankStride = kRanks + kPad;
  // Chunks under way cover the latency of memory. A small tile moves fewer bytes in each.
  static constexpr int kStages = kTileRows > 32 ? (kRanks > 64 ? 3 : 4) : (kRanks > 64 ? 4 : 6);
  static constexpr int kMinBlocks = kRanks > 64 ? 1 : 2;  // of a multiprocessor's registers
  static constexpr int kRowsElements = kTileRows * kRowStride;
  static constexpr int kDownElements = kRanks * kRowStride, kUpElements = kChunk * kRankStride;
  static constexpr int kWeightElements = kDownElements > kUpElements ? kDownElements : kUpElements;
  static constexpr int kHiddenElements = kTileRows * kRankStride;
  static_assert(sizeof(T) == 2, "mma_m16n8k16 multiplies 16-bit elements");
  static_assert(kRanks % (8 * kRankWarps) == 0, "each warp has whole tiles of 8 ranks");
  static_assert(kColumnTiles == 2, "a warp has two 16-byte pieces of each row of y");
  // Half of the sums pass through the slot that is free between the products.
  static constexpr int kSlotBytes = (kRowsElements + kWeightElements) * sizeof(T);
  static_assert(kHalves == 1 || kTileRows * kRanks * sizeof(float) <= kSlotBytes,
                "a slot has room for the sums of one half");
};

template <class C>
struct Slot {  // of the ring: what one step of a product takes
  alignas(16) typename C::T rows[C::kRowsElements];      // a chunk of x; of the residual, then of y
  alignas(16) typename C::T weight[C::kWeightElements];  // a chunk of W_down or of W_up
};

template <class C>
struct StreamShared {
  Slot<C> slots[C::kStages];
  alignas(16) typename C::T hidden[C::kHiddenElements];  // h, then phi(h)
  alignas(16) typename C::T zeros[kChunk];               // the rows beside the gate's weight
  alignas(16) float b_down[C::kRanks];
  float logit[C::kTileRows];       // w . x + b of a learned gate
  float half_logit[C::kTileRows];  // the second half's share
  float pooled[2];  // over the sentence's tiles: the sum of gates, and the rows that count
  alignas(16) float columns[];  // b_up [D], and the gate's weight [D] in the activation's type
};

template <class C>
size_t stream_bytes(const Call& in) {
  return sizeof(StreamShared<C>) + in.D * (sizeof(float) + sizeof(typename C::T));
}

inline Tiling tiling_of(const Call& in, int tile_rows) {
  const int64_t groups = has_pooled_gate(in) || has_weights_per_sample(in) ? in.B : 1;
  return cut_rows(groups, rows_of(in) / groups, tile_rows);
}

template <class C>
bool serves_forward(const Call& in) {
  if (!serves<C>(in)) return false;
  if constexpr (C::Options::kIsListed) {
    if (stream_bytes<C>(in) > max_shared_bytes()) return false;
    // A tall tile reads the weights less often, but with fewer tiles than multiprocessors some of
    // these would have nothing to do.
    return C::kTileRows == 16 || 4 * tiling_of(in, C::kTileRows).tiles >= 3 * multiprocessors();
  }
  return true;
}

using StreamConfigs =
    TypeList<StreamConfig<bf16, 16, 64>, StreamConfig<bf16, 48, 64>, StreamConfig<bf16, 64, 64>,
             StreamConfig<bf16, 128, 64>, StreamConfig<bf16, 32, 32>, StreamConfig<bf16, 64, 32>,
             StreamConfig<bf16, 128, 32>, StreamConfig<bf16, 32, 16>, StreamConfig<bf16, 64, 16>,
             StreamConfig<bf16, 128, 16>, StreamConfig<f16, 16, 64>, StreamConfig<f16, 64, 64>,
             StreamConfig<f16, 128, 64>, StreamConfig<f16, 32, 16>, StreamConfig<f16, 64, 16>,
             StreamConfig<f16, 128, 16>>;

// The kernels that ask for everything at run time: dtype; ranks whose sums are in registers at a time;
// ranks that fit in shared memory; options. The first that fits a call serves it.
template <template <class, int, int, class> class Config>
using GeneralConfigsOf = TypeList<Config<bf16, 64, 64, General>, Config<bf16, 128, 512, General>,
                                  Config<f16, 64, 64, General>, Config<f16, 128, 512, General>>;

// ---- the weights' gradients ----

// Dtype; the ranks of a tile; whether x and dy are multiplied as they lie
// in memory, with neither dropout nor a pre-norm between.
template <template <class, int, bool> class Config>
using WeightConfigsOf =
    TypeList<Config<bf16, 16, true>, Config<bf16, 48, true>, Config<bf16, 64, true>,
             Config<f16, 16, true>, Config<f16, 64, true>, Config<bf16, 16, false>,
             Config<bf16, 48, false>, Config<bf16, 64, false>, Config<f16, 16, false>,
             Config<f16, 64, false>>;

// The fewest tiles, and of these the smallest that is listed.
constexpr int weight_ranks(DType dtype, int64_t R) {
  if (R <= 16) return 16;
  const int64_t tiles = (R + 63) / 64;
  return dtype == DType::kBF16 && R <= 48 * tiles ? 48 : 64;
}

// Floats that a block leaves of a tile: the gradients of both weights [ranks, columns], then db_up
// and dw_gate [columns], db_down [ranks].
constexpr int partial_floats(int ranks) { return 2 * ranks * kChunk + 2 * kChunk + ranks; }

}  // namespace pelt::gated_adapter
