// The product whose result is narrow: [32 rows, K] x [K, ranks] -> [32, ranks], ranks 16, 32 or 64.
//
//        x, dy [32, K] in chunks of 64     x    A [ranks, K] or B [K, ranks] in chunks of 64
//
// A ring of kStages buffers holds the chunks that cp.async brings. The four warps divide a chunk's
// 64 columns of the reduction, 16 each, and have the whole result in registers; their four sums are
// added in shared memory at the end, in a fixed order. So 32 rows are enough work for a block, and
// T rows give T / 32 blocks: what brings x in is many blocks with several chunks in flight each.
#pragma once

#include "common/type_list.h"
#include "ops/lora_linear/copies.cuh"

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
struct NarrowStage {
  using T = typename C::T;
  alignas(16) T x[kNarrowRows * kChunkStride];
  alignas(16) T factor[C::kFactorElements];

  static constexpr int kFactor =
      sizeof(T) * kNarrowRows * kChunkStride;  // where it begins, in bytes
};

template <class C>
struct NarrowShared {
  // The warps' sums take the ring's place when the last chunk has been multiplied.
  union {
    alignas(16) NarrowStage<C> ring[kStages];
    alignas(16) float sums[kWarps][kNarrowRows * C::kSumStride];
  };
  Source source[C::kRanks];  // of A's rows and the gates' weights; unused with B
  int is_last;
};

// How the factor lies in memory: A as [ranks, K], B as [K, ranks].
enum class Factor { kRowsOfA, kRowsOfB };

// s.sums[0] = the product. Both operands of the next chunk come by copies.fetch(stage), which asks
// for them, and copies.put(stage), which stores what fetch has left in registers, if anything; a
// stage is its distance from the ring's first in bytes.
template <Factor kFactor, class C, class Copies>
__device__ __forceinline__ void multiply_narrow(NarrowShared<C>& s, int depth, Copies& copies) {
  using T = typename C::T;
  constexpr int kStage = sizeof(NarrowStage<C>);
  const int chunks = (depth + kChunk - 1) / kChunk;
  // A group is committed also where there is no chunk left, so that "all but the newest
  // kStages - 2 groups" below always means this turn's chunk.
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < chunks) {
      copies.fetch(chunk * kStage);
      copies.put(chunk * kStage);
    }
    cp_async_commit();
  }
  FragmentD sums[2][C::kTiles];  // rows 0-15 and 16-31
  // Where a lane reads its fragments in the first stage; the warp has 16 columns of every chunk.
  const int lane = lane_index(), k = warp_index() * 16;
  const uint32_t ring = shared_address(s.ring);
  const uint32_t x =
      kept_address(ring + sizeof(T) * (lane % 16 * kChunkStride + lane / 16 * 8 + k));
  // The mma wants B with its k index running along a register: A's rows lie so, B's rows are
  // transposed on the way into registers.
  constexpr bool kIsTransposed = kFactor == Factor::kRowsOfB;
  constexpr int kPairBytes = sizeof(T) * 16 * (kIsTransposed ? 1 : kChunkStride);
  const int of_factor = kIsTransposed
                            ? (k + lane % 16) * C::kRankStride + lane / 16 * 8
                            : (lane % 8 + lane / 16 * 8) * kChunkStride + lane / 8 % 2 * 8 + k;
  const uint32_t factor = kept_address(ring + NarrowStage<C>::kFactor + sizeof(T) * of_factor);
  uint32_t stage = 0, newest = (kStages - 1) * kStage;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    // This thread's copies of the chunk are there; the barrier makes every thread's visible. It
    // also says that all warps have read the buffer of the chunk before, which is filled anew.
    cp_async_wait<kStages - 2>();
    sync_threads();
    const bool has_next = chunk + kStages - 1 < chunks;
    if (has_next) copies.fetch(newest);
    cp_async_commit();
    const FragmentA low = load_a_at<0>(x + stage);
    const FragmentA high = load_a_at<sizeof(T) * 16 * kChunkStride>(x + stage);
    for_constants<C::kTiles / 2>([&](auto pair) {
      constexpr int i = decltype(pair)::value;
      FragmentB b[2];
      load_b_pair_at<kIsTransposed, i * kPairBytes>(b, factor + stage);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add<T>(sums[0][2 * i + half], low, b[half]);
        multiply_add<T>(sums[1][2 * i + half], high, b[half]);
      }
    });
    if (has_next) copies.put(newest);
    newest = stage;
    stage = stage == (kStages - 1) * kStage ? 0 : stage + kStage;
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
  constexpr int kQuads = C::kRanks / 4;
#pragma unroll
  for (int turn = 0; turn < kNarrowRows * kQuads / kThreads; ++turn) {
    const int i = thread_index() + turn * kThreads;
    const int at = i / kQuads * C::kSumStride + i % kQuads * 4;
    Words4 part[kWarps], sum;
    for (int warp = 0; warp < kWarps; ++warp) part[warp] = load_16(s.sums[warp] + at);
    for (int e = 0; e < 4; ++e) {
      float of[kWarps];
      for (int warp = 0; warp < kWarps; ++warp) of[warp] = float_from_bits(part[warp].word[e]);
      sum.word[e] = bits_of((of[0] + of[1]) + (of[2] + of[3]));
    }
    store_16(s.sums[0] + at, sum);
  }
  // Callers read elements that other threads have added.
  sync_threads();
}

}  // namespace pelt::lora_linear
