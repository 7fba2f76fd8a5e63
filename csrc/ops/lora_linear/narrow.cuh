// The product whose result is narrow: [32 rows, K] x [K, ranks] -> [32, ranks], ranks 16 or 64.
//
//        x, dy [32, K] in chunks of 64     x    A [ranks, K] or B [K, ranks] in chunks of 64
//
// A ring of kStages buffers holds the chunks that cp.async brings. The four warps divide a chunk's
// 64 columns of the reduction, 16 each, and have the whole result in registers; their four sums are
// added in shared memory at the end, in a fixed order. So 32 rows are enough work for a block, and
// T rows give T / 32 blocks: what brings x in is many blocks with several chunks in flight each.
#pragma once

#include "common/type_list.h"
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {

constexpr int kStages = 5;

template <class T_, int kRanks_>
struct NarrowConfig {
  using T = T_;
  static constexpr int kRanks = kRanks_;  // columns of the result: ranks, and gates beside them
  static constexpr int kTiles = kRanks / 8;
  // Rows of B are padded like those of x (see cuda/fragment.cuh).
  static constexpr int kRankStride = kRanks + kTilePad;
  // 4 floats more than the ranks: the rows that a fragment's lanes write start in other banks.
  static constexpr int kSumStride = kRanks + 4;
  // One buffer for either factor: A as [ranks, chunk] or B as [chunk, ranks].
  static constexpr int kFactorElements =
      kRanks * kChunkStride > kChunk* kRankStride ? kRanks * kChunkStride : kChunk * kRankStride;
  static_assert(sizeof(T) == 2, "mma_m16n8k16 multiplies 16-bit elements");
  static_assert(kRanks % 16 == 0, "fragments of B come in pairs of 8 columns");
};

template <class C>
struct NarrowShared {
  using T = typename C::T;
  struct Ring {
    alignas(16) T x[kStages][kNarrowRows * kChunkStride];
    alignas(16) T factor[kStages][C::kFactorElements];
  };
  // The warps' sums take the ring's place when the last chunk has been multiplied.
  union {
    Ring ring;
    alignas(16) float sums[kWarps][kNarrowRows * C::kSumStride];
  };
  Source source[C::kRanks];  // of A's rows and the gates' weights; unused with B
  int is_last;
};

using NarrowConfigs = TypeList<NarrowConfig<bf16, 16>, NarrowConfig<bf16, 64>,
                               NarrowConfig<f16, 16>, NarrowConfig<f16, 64>>;

// How the factor lies in memory: A as [ranks, K], B as [K, ranks].
enum class Factor { kRowsOfA, kRowsOfB };

// s.sums[0] = the product. stage_chunk(stage, first column of the reduction) brings both operands.
template <Factor kFactor, class C, class StageChunk>
__device__ __forceinline__ void multiply_narrow(NarrowShared<C>& s, int depth,
                                                StageChunk&& stage_chunk) {
  const int chunks = (depth + kChunk - 1) / kChunk;
  // A group is committed also where there is no chunk left, so that "all but the newest
  // kStages - 2 groups" below always means this turn's chunk.
  auto bring = [&](int chunk) {
    if (chunk < chunks) stage_chunk(chunk % kStages, chunk * kChunk);
    cp_async_commit();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) bring(chunk);
  FragmentD sums[2][C::kTiles];     // rows 0-15 and 16-31
  const int k = warp_index() * 16;  // the warp's columns of every chunk
  for (int chunk = 0; chunk < chunks; ++chunk) {
    // This thread's copies of the chunk are there; the barrier makes every thread's visible. It
    // also says that all warps have read the buffer of the chunk before, which is filled anew.
    cp_async_wait<kStages - 2>();
    sync_threads();
    bring(chunk + kStages - 1);
    const auto* x = s.ring.x[chunk % kStages];
    const auto* factor = s.ring.factor[chunk % kStages];
    const FragmentA low = load_a(x + k, kChunkStride);
    const FragmentA high = load_a(x + 16 * kChunkStride + k, kChunkStride);
#pragma unroll
    for (int n = 0; n < C::kTiles; n += 2) {
      FragmentB b[2];
      // The mma wants B with its k index running along a register: A's rows lie so, B's rows are
      // transposed on the way into registers.
      if constexpr (kFactor == Factor::kRowsOfA) {
        load_b_pair(b, factor + 8 * n * kChunkStride + k, kChunkStride);
      } else {
        load_b_pair_transposed(b, factor + k * C::kRankStride + 8 * n, C::kRankStride);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add<typename C::T>(sums[0][n + i], low, b[i]);
        multiply_add<typename C::T>(sums[1][n + i], high, b[i]);
      }
    }
  }
  // The sums are written where the ring was: no copy may be under way and no warp may still read.
  cp_async_wait<0>();
  sync_threads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * half + FragmentD::row(i), column = 8 * n + FragmentD::column(i);
        s.sums[warp_index()][row * C::kSumStride + column] = sums[half][n].r[i];
      }
    }
  }
  // All four warps' sums are there to be added.
  sync_threads();
  for (int i = thread_index(); i < kNarrowRows * C::kRanks; i += kThreads) {
    const int at = i / C::kRanks * C::kSumStride + i % C::kRanks;
    s.sums[0][at] = (s.sums[0][at] + s.sums[1][at]) + (s.sums[2][at] + s.sums[3][at]);
  }
  // Callers read elements that other threads have added.
  sync_threads();
}

}  // namespace pelt::lora_linear
