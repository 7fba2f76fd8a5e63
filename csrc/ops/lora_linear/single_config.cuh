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
  static constexpr int kThreads = 256;
  static constexpr int kRows = kSingleRows;
  static constexpr int kColumns = kColumns_;
  static constexpr int kDepth = 64;  // of a chunk
  static constexpr int kStages = 3;
  static constexpr int kWarpRows = 64;
  static constexpr int kWarpColumns = kColumns / 4;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpColumns / 8;
  static constexpr int kSlots = kRanks / kSlot;
  static constexpr int kSumStride = kRanks + 4;
  static constexpr int kRankStride = kRanks + kTilePad;
  static constexpr int kOutStride = kColumns + kTilePad;
  // Q lies as [N, ranks] in forward and as [ranks, N] in backward, P the other way round.
  static constexpr int kUpElements = kIsForward ? kColumns * kRankStride : kRanks * kOutStride;
  static constexpr int kDownVectors = kRanks * kDepth / 8;
  static constexpr int kHeld = (kDownVectors + kThreads - 1) / kThreads;  // of a thread
  // With few ranks two blocks share a multiprocessor that has the shared memory (Hopper's has, an
  // A100's has not): one multiplies while the other begins or ends.
  static constexpr int kMinBlocks = kRanks <= 16 && kColumns == kSingleColumns ? 2 : 1;
  static_assert(kRows / kWarpRows * (kColumns / kWarpColumns) == kThreads / 32,
                "each warp has its part of the block's tile");
  static_assert(kColumns / kWarpColumns == kTilesM, "a row of warps divides its rows for P");
};

// In the order in which `run_single` tries them: the fewest ranks that fit.
template <bool F>
using SingleConfigs =
    TypeList<SingleConfig<bf16, F, true, 16, 128>, SingleConfig<bf16, F, true, 64, 128>,
             SingleConfig<bf16, F, false, 16, 128>, SingleConfig<bf16, F, false, 64, 128>,
             SingleConfig<f16, F, true, 16, 128>, SingleConfig<f16, F, true, 64, 128>,
             SingleConfig<f16, F, false, 16, 128>, SingleConfig<f16, F, false, 64, 128>,
             SingleConfig<bf16, F, true, 16, 256>, SingleConfig<bf16, F, false, 16, 256>,
             SingleConfig<f16, F, true, 16, 256>, SingleConfig<f16, F, false, 16, 256>>;

}  // namespace pelt::lora_linear
