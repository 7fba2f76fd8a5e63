// The sizes of the single-launch form's kernels (single.cuh), and those that are compiled, for both
// directions.
#pragma once

#include "common/type_list.h"
#include "ops/lora_linear/slots.h"
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {

template <class T_, bool kIsForward_, bool kHasRowsOfN_, int kRanks_, int kColumns_>
struct SingleConfig {
  using T = T_;
  static constexpr bool kIsForward = kIsForward_;
  static constexpr bool kHasRowsOfN = kHasRowsOfN_;  // the weight lies as [N, K], not as [K, N]
  static constexpr int kRanks = kRanks_;             // columns of sums that fit
  static constexpr int kColumns = kColumns_;
  static constexpr int kRows = single_rows(kColumns);
  static constexpr bool kIsSmall = kColumns == kSingleSmallColumns;
  // Of a chunk. An A100 has memory for two blocks with four stages of 32; the products of a small
  // tile are worth a barrier only at twice the depth.
  static constexpr int kDepth = kIsSmall ? 64 : 32;
  static constexpr int kStages = kIsSmall ? 3 : 4;
  // Each fragment that a warp loads meets all fragments of the other operand, so a warp of 64 x 64
  // loads 8 of them for 32 products where one of 64 x 32 loads 6 for 16. The sums of many ranks take
  // the registers of half of the columns; a small tile is cut among as many warps as a large one.
  static constexpr int kWarpRows = kIsSmall ? 32 : 64;
  static constexpr int kWarpColumns = kIsSmall || kRanks > kSlot ? 32 : 64;
  static constexpr int kDown = kRows / kWarpRows;
  static constexpr int kAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kDown * kAcross;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpColumns / 8;
  static constexpr int kOwnTiles = kTilesM / kAcross;  // of 16 rows that a warp multiplies by P
  static constexpr int kOwnRows = 16 * kOwnTiles;
  static constexpr int kSlots = kRanks / kSlot;
  static constexpr int kSumStride = kRanks + 4;
  static constexpr int kRankStride = kRanks + kTilePad;
  static constexpr int kOutStride = kColumns + kTilePad;
  // Q lies as [N, ranks] in forward and as [ranks, N] in backward, P the other way round.
  static constexpr int kUpElements = kIsForward ? kColumns * kRankStride : kRanks * kOutStride;
  // Blocks that share a multiprocessor's registers: eight warps, sixteen with few sums.
  static constexpr int kMinBlocks = kIsSmall ? 4 : kThreads == 128 ? 2 : 1;
  static_assert(kOwnTiles * kAcross == kTilesM, "a row of warps divides its rows for P");
  static_assert(kRanks * kDepth / 8 <= kThreads, "a thread has at most one vector of P");
};

// In the order in which `run_single` tries them: the fewest ranks that fit.
template <bool F>
using SingleConfigs =
    TypeList<SingleConfig<bf16, F, true, 16, 64>, SingleConfig<bf16, F, false, 16, 64>,
             SingleConfig<bf16, F, true, 16, 128>, SingleConfig<bf16, F, true, 64, 128>,
             SingleConfig<bf16, F, false, 16, 128>, SingleConfig<bf16, F, false, 64, 128>,
             SingleConfig<bf16, F, true, 16, 256>, SingleConfig<bf16, F, false, 16, 256>,
             SingleConfig<f16, F, true, 16, 64>, SingleConfig<f16, F, false, 16, 64>,
             SingleConfig<f16, F, true, 16, 128>, SingleConfig<f16, F, true, 64, 128>,
             SingleConfig<f16, F, false, 16, 128>, SingleConfig<f16, F, false, 64, 128>,
             SingleConfig<f16, F, true, 16, 256>, SingleConfig<f16, F, false, 16, 256>>;

}  // namespace pelt::lora_linear
