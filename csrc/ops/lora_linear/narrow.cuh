// The product whose result is narrow: [32 rows, K] x [K, columns] -> [32, columns], columns 16
// or 64.
//
//        x, dy [32, K] in chunks of 64     x    A [columns, K] or B [K, columns] in chunks of 64
//
// A ring of kStages buffers holds the chunks that cp.async brings. The four warps divide a chunk's
// 64 columns of the reduction, 16 each, and have the whole result in registers; their four parts
// meet in shared memory at the end, in a fixed order. So 32 rows are enough work for a block, and T
// rows give T / 32 blocks: what brings x in is many blocks with two chunks in flight each.
#pragma once

#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {

constexpr int kNarrowRows = 32;
constexpr int kStages = 5;

template <class T_, int kColumns_>
struct NarrowConfig {
  using T = T_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kWideStride = kColumns + kTilePad;
  static constexpr int kSumStride = kColumns + 4;
  static constexpr int kFactorElements = kColumns * kChunkStride > kChunk* kWideStride
                                             ? kColumns * kChunkStride
                                             : kChunk * kWideStride;
  static_assert(sizeof(T) == 2, "mma_m16n8k16 multiplies 16-bit elements");
  static_assert(kColumns % 16 == 0, "fragments of B come in pairs of 8 columns");
};

template <class C>
struct NarrowShared {
  using T = typename C::T;
  struct Ring {
    alignas(16) T x[kStages][kNarrowRows * kChunkStride];
    alignas(16) T factor[kStages][C::kFactorElements];
  };
  union {
    Ring ring;
    alignas(16) float sums[kWarps][kNarrowRows * C::kSumStride];
  };
  Source source[C::kColumns];
  int is_last;
};

// A's rows lie as [columns, K], B as [K, columns].
enum class Factor { kRowsOfA, kRowsOfB };

// s.sums[0] = the product. stage_chunk(stage, first column of the reduction) brings both operands.
template <Factor kFactor, class C, class StageChunk>
__device__ __forceinline__ void multiply_narrow(NarrowShared<C>& s, int depth,
                                                StageChunk&& stage_chunk) {
  const int chunks = (depth + kChunk - 1) / kChunk;
  auto bring = [&](int chunk) {
    if (chunk < chunks) stage_chunk(chunk % kStages, chunk * kChunk);
    cp_async_commit();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) bring(chunk);
  FragmentD sums[2][C::kTiles];
  const int k = warp_index() * 16;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    sync_threads();
    bring(chunk + kStages - 1);  // into the buffer that was used up before the barrier
    const auto* x = s.ring.x[chunk % kStages];
    const auto* factor = s.ring.factor[chunk % kStages];
    const FragmentA low = load_a(x + k, kChunkStride);
    const FragmentA high = load_a(x + 16 * kChunkStride + k, kChunkStride);
#pragma unroll
    for (int n = 0; n < C::kTiles; n += 2) {
      FragmentB b[2];
      if constexpr (kFactor == Factor::kRowsOfA) {
        load_b_pair(b, factor + 8 * n * kChunkStride + k, kChunkStride);
      } else {
        load_b_pair_transposed(b, factor + k * C::kWideStride + 8 * n, C::kWideStride);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add<typename C::T>(sums[0][n + i], low, b[i]);
        multiply_add<typename C::T>(sums[1][n + i], high, b[i]);
      }
    }
  }
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
  sync_threads();
  for (int i = thread_index(); i < kNarrowRows * C::kColumns; i += kThreads) {
    const int at = i / C::kColumns * C::kSumStride + i % C::kColumns;
    s.sums[0][at] = (s.sums[0][at] + s.sums[1][at]) + (s.sums[2][at] + s.sums[3][at]);
  }
  sync_threads();
}

}  // namespace pelt::lora_linear
