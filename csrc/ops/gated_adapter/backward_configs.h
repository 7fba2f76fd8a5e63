// The configurations of the listed kernels of backward's first launch, for the kernels, their launcher
// and launch.cpp, which cuts the rows.
#pragma once

#include "ops/gated_adapter/configs.h"

namespace pelt::gated_adapter {

// Dtype, ranks, rows of a tile, warps. A warp has 16 rows; warps that share them have a part of the
// ranks each, and of the columns of a chunk.
template <class T_, int kRanks_, int kTileRows_, int kWarps_>
struct BackwardConfig {
  using T = T_;
  using Options = Usual;
  static constexpr int kRanks = kRanks_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSplit = kWarps / (kTileRows / 16);  // warps that share rows
  static constexpr int kRankTiles = kRanks / 8 / kSplit;    // of a warp, 8 ranks each
  static constexpr int kColumnTiles = kChunk / 8 / kSplit;
  // Elements from row to row of a chunk of rows or of W_down, and of dh or a chunk of W_up.
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
  static_assert(kRanks % (8 * kSplit) == 0, "each warp has whole tiles of 8 ranks");
  static_assert(kColumnTiles % 2 == 0, "fragments of B come in pairs of 8 columns");
};

template <class C>
struct BackwardShared {
  using T = typename C::T;
  Slot<C> slots[C::kStages];
  alignas(16) T hidden[C::kHiddenElements];  // dh
  alignas(16) T zeros[kChunk];         // the rows beside a vector that is one row of a product
  float dot[C::kSplit][C::kTileRows];  // dy' . u: shares of the warps with the same rows
  float logit[C::kTileRows];           // w . x + b, of a pooled gate
  float dlogit[C::kTileRows];
  float pooled[2];          // over the sentence's tiles: the sum of dots, and the rows that count
  alignas(16) T columns[];  // b_up [D], and the gate's weight [D]
};

template <class C>
size_t backward_bytes(const Call& in) {
  return sizeof(BackwardShared<C>) + 2 * static_cast<size_t>(in.D) * sizeof(typename C::T);
}

template <class C>
bool serves_backward(const Call& in) {
  if (!serves<C>(in) || backward_bytes<C>(in) > max_shared_bytes()) return false;
  // As in forward: tall tiles where there are enough of them.
  return C::kTileRows == 16 || 4 * tiling_of(in, C::kTileRows).tiles >= 3 * multiprocessors();
}

using BackwardConfigs = TypeList<BackwardConfig<bf16, 16, 64, 8>, BackwardConfig<bf16, 48, 64, 8>,
                                 BackwardConfig<bf16, 64, 64, 8>, BackwardConfig<bf16, 128, 64, 8>,
                                 BackwardConfig<bf16, 48, 32, 4>, BackwardConfig<bf16, 64, 32, 4>,
                                 BackwardConfig<bf16, 64, 16, 4>, BackwardConfig<bf16, 128, 16, 4>,
                                 BackwardConfig<f16, 64, 16, 4>, BackwardConfig<f16, 128, 16, 4>>;

}  // namespace pelt::gated_adapter
