// The two products that forward and backward are made of, with their shared memory. A block of 4
// warps owns kBlockT rows, a warp 16 of them:
//
//   project_to_ranks    [64, D] x [D, R] -> [64, R], reduces over the columns, chunk by chunk
//                       forward: x with W_down;  backward: dy with W_up
//   project_to_columns  [64, R] x [R, D] -> [64, D], reduces over the ranks, leaves chunk by chunk
//                       forward: phi(h) with W_up;  backward: dh with W_down
//
// Both read weights as they lie in memory; in backward the fragments are loaded transposed.
#pragma once

#include "ops/gated_adapter/configs.h"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {

constexpr int kStages = 3;  // buffers of the ring: one in use, two on the way

template <class T_, int kRankBlock_, int kRanks_, class Options_>
struct Config {
  using T = T_;
  using Options = Options_;
  static constexpr int kRankBlock = kRankBlock_;     // ranks whose sums are in registers at a time
  static constexpr int kRanks = kRanks_;             // ranks that fit in shared memory
  static constexpr int kRankTiles = kRankBlock / 8;  // of 8 columns, as mma_m16n8k16 has them
  // Elements from row to row of h, and of a tile of W_up.
  static constexpr int kHiddenStride = kRanks + kTilePad;
  static constexpr int kUpStride = kRankBlock + kTilePad;
  // Either weight's tile: W_down [rank block, chunk] or W_up [chunk, rank block].
  static constexpr int kDownElements = kRankBlock * kChunkStride;
  static constexpr int kUpElements = kChunk * kUpStride;
  static constexpr int kWeightElements = kDownElements > kUpElements ? kDownElements : kUpElements;
  // Blocks that share a multiprocessor's registers: left alone, the compiler goes for more of them
  // and spills.
  static constexpr int kMinBlocks = kRanks > 64 ? 2 : 3;
  static_assert(sizeof(T) == 2, "mma_m16n8k16 multiplies 16-bit elements");
  static_assert(kRankBlock % 16 == 0, "a rank block is a whole number of k steps of mma_m16n8k16");
  static_assert(kRanks % kRankBlock == 0, "the ranks are a whole number of rank blocks");
  static_assert(kRankBlock <= 128, "64 float sums a thread are what the registers hold");
};

template <class C>
struct Shared {
  using T = typename C::T;
  // project_to_ranks reads x, the results of project_to_columns leave through out: never both.
  union {
    alignas(16) T x[kStages][kBlockT * kChunkStride];
    alignas(16) float out[kWarps][16 * kOutStride];  // a warp's rows of a chunk of columns
  };
  alignas(16) T weight[kStages][C::kWeightElements];
  alignas(16) T extra[kStages][8 * kChunkStride];    // an extra row; the seven below it stay zero
  alignas(16) T hidden[kBlockT * C::kHiddenStride];  // h, phi(h) or dh
  RowState rows;
  float dot[kBlockT];       // backward: dy . dropout(post_norm(u))
  float dlogit[kBlockT];    // backward: the gradient of rows.logit
  float out_mean[kBlockT];  // of the adapter's output, with a post-norm
  float out_rstd[kBlockT];
  float pooled[2];    // over the sentence's tiles: the sum of gates or of dots, the rows that count
  int has_live_rows;  // forward: a row of the tile that is not skipped
};

template <class C>
__device__ __forceinline__ int rank_blocks_of(const Call& in) {
  if constexpr (C::kRanks == C::kRankBlock) return 1;
  return (in.R + C::kRankBlock - 1) / C::kRankBlock;
}

// One more row of the weight in project_to_ranks, whose products cost one mma for each 16 columns:
// the gate's weight in forward, the bias of the up projection in backward.
struct ExtraRow {
  Parameter row;
  int64_t offset;
  bool is_there;
};

// Zeros in the extra rows' tiles, of which only row 0 is written later; once, before the first
// product. The caller has a barrier behind it.
template <class C>
__device__ __forceinline__ void clear_extra_rows(Shared<C>& s) {
  constexpr int kVectorsOfTiles = kStages * 8 * kChunkStride / 8;
  for (int i = thread_index(); i < kVectorsOfTiles; i += kThreads) {
    store_16(&s.extra[0][0] + 8 * i, Words4{});
  }
}

// W_down lies as [R, D], W_up as [D, R]; a tile keeps the order of memory.
enum Weight { kDown, kUp };

// A tile of a 16-bit weight whose rows and their ends lie at 16-byte borders; zeros beyond `rows` and
// `columns`.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void stage_vectors(T* tile, int stride, const void* weight,
                                              const Rectangle& from) {
  constexpr int kVectorsPerRow = kColumns / 8;
  for (int i = thread_index(); i < kRows * kVectorsPerRow; i += kThreads) {
    const int row = i / kVectorsPerRow, column = i % kVectorsPerRow * 8;
    const bool is_there = row < from.rows && column < from.columns;
    const int64_t at = is_there ? from.offset + row * from.leading + column : 0;
    cp_async_16(tile + row * stride + column, static_cast<const T*>(weight) + at, is_there);
  }
}

template <Weight kWeight, class C>
__device__ __forceinline__ void stage_weight_tile(const Call& in, Shared<C>& s, const void* weight,
                                                  int64_t member, int first, int rank, int buffer) {
  using T = typename C::T;
  constexpr int kRows = kWeight == kDown ? C::kRankBlock : kChunk;
  constexpr int kColumns = kWeight == kDown ? kChunk : C::kRankBlock;
  constexpr int kStride = kWeight == kDown ? kChunkStride : C::kUpStride;
  const int leading = kWeight == kDown ? in.D : in.R;
  const int row = kWeight == kDown ? rank : first, column = kWeight == kDown ? first : rank;
  const int rows = kWeight == kDown ? in.R : in.D;
  const int64_t offset = member * in.R * in.D + static_cast<int64_t>(row) * leading + column;
  const Rectangle from{offset, leading, rows - row, leading - column};
  if constexpr (C::Options::kIsListed) {
    stage_vectors<T, kRows, kColumns>(s.weight[buffer], kStride, weight, from);
  } else {
    stage<T, kRows, kColumns>(s.weight[buffer], kStride, {weight, /*is_float32=*/false}, from);
  }
}

// For each rank block: finish(first rank, sums of this warp's [16, rank block]). stage_rows(tile,
// first column) brings a chunk of the left operand. Returns the extra row's products, in column 0.
//
// Steps run over the chunks of columns, for one rank block after the other. A step's chunks are
// asked for two steps earlier and lie in the ring's buffer `step % kStages`.
template <Weight kWeight, class C, class StageRows, class Finish>
__device__ __forceinline__ FragmentD project_to_ranks(const Call& in, Shared<C>& s,
                                                      const void* weight, int64_t member,
                                                      const ExtraRow& extra, StageRows&& stage_rows,
                                                      Finish&& finish) {
  using T = typename C::T;
  const int chunks = (in.D + kChunk - 1) / kChunk;
  const int steps = rank_blocks_of<C>(in) * chunks;
  auto bring = [&](int step) {
    if (step < steps) {
      const int first = step % chunks * kChunk;
      stage_rows(s.x[step % kStages], first);
      stage_weight_tile<kWeight, C>(in, s, weight, member, first, step / chunks * C::kRankBlock,
                                    step % kStages);
      if (extra.is_there && step < chunks) {  // once, beside the first rank block
        stage<T, 1, kChunk>(s.extra[step % kStages], kChunkStride, extra.row,
                            {extra.offset + first, in.D, 1, in.D - first});
      }
    }
    cp_async_commit();  // an empty group too: cp_async_wait counts groups
  };
  for (int step = 0; step < kStages - 1; ++step) bring(step);

  FragmentD sums[C::kRankTiles];
  FragmentD extra_sums;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();  // this thread's copies of the step have landed
    sync_threads();                // and everybody's; nobody reads the buffer of the step before
    bring(step + kStages - 1);     // into that buffer
    const T* rows = s.x[step % kStages] + warp_index() * 16 * kChunkStride;  // this warp's 16
    const T* tile = s.weight[step % kStages];
    for (int k = 0; k < kChunk; k += 16) {
      const FragmentA a = load_a(rows + k, kChunkStride);
      for (int n = 0; n < C::kRankTiles; n += 2) {
        FragmentB b[2];  // of 16 ranks
        if constexpr (kWeight == kDown) {
          load_b_pair(b, tile + 8 * n * kChunkStride + k, kChunkStride);
        } else {
          load_b_pair_transposed(b, tile + k * C::kUpStride + 8 * n, C::kUpStride);
        }
        multiply_add<T>(sums[n], a, b[0]);
        multiply_add<T>(sums[n + 1], a, b[1]);
      }
      if (extra.is_there && step < chunks) {
        multiply_add<T>(extra_sums, a, load_b(s.extra[step % kStages] + k, kChunkStride));
      }
    }
    if (step % chunks == chunks - 1) {  // the rank block's sums are complete
      finish(step / chunks * C::kRankBlock, sums);
      for (FragmentD& sum : sums) sum = FragmentD{};
    }
  }
  sync_threads();  // what finish has written is there, and the ring is free
  return extra_sums;
}

// For each chunk of 64 columns: visit(first column, sums of this warp's [16, 64]), from s.hidden.
template <Weight kWeight, class C, class Visit>
__device__ __forceinline__ void project_to_columns(const Call& in, Shared<C>& s, const void* weight,
                                                   int64_t member, Visit&& visit) {
  using T = typename C::T;
  const int rank_blocks = rank_blocks_of<C>(in);
  const int steps = (in.D + kChunk - 1) / kChunk * rank_blocks;
  auto bring = [&](int step) {
    if (step < steps) {
      stage_weight_tile<kWeight, C>(in, s, weight, member, step / rank_blocks * kChunk,
                                    step % rank_blocks * C::kRankBlock, step % kStages);
    }
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) bring(step);

  FragmentD sums[kChunk / 8];
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();  // as in project_to_ranks
    sync_threads();
    bring(step + kStages - 1);
    const int rank = step % rank_blocks * C::kRankBlock;
    const T* hidden =
        s.hidden + warp_index() * 16 * C::kHiddenStride + rank;  // this warp's 16 rows
    const T* tile = s.weight[step % kStages];
    for (int k = 0; k < C::kRankBlock; k += 16) {
      const FragmentA a = load_a(hidden + k, C::kHiddenStride);
      for (int n = 0; n < kChunk / 8; n += 2) {
        FragmentB b[2];  // of 16 columns
        if constexpr (kWeight == kUp) {
          load_b_pair(b, tile + 8 * n * C::kUpStride + k, C::kUpStride);
        } else {
          load_b_pair_transposed(b, tile + k * kChunkStride + 8 * n, kChunkStride);
        }
        multiply_add<T>(sums[n], a, b[0]);
        multiply_add<T>(sums[n + 1], a, b[1]);
      }
    }
    if (step % rank_blocks == rank_blocks - 1) {  // the chunk's sums are complete
      visit(step / rank_blocks * kChunk, sums);
      for (FragmentD& sum : sums) sum = FragmentD{};
    }
  }
  sync_threads();  // the ring is free, and so is `out`, which lies in its place
}

// A tile of h or dh [rows, R] in shared memory and in a global [B * S, R]: copy_8(in shared, in
// global) for pieces of eight elements if rows start at 16-byte borders, else copy_1 for each.
template <class C, class Copy8, class Copy1>
__device__ __forceinline__ void for_each_hidden(const Call& in, const TileRows& rows,
                                                Copy8&& copy_8, Copy1&& copy_1) {
  const int64_t first = rows.first * in.R;
  if (C::Options::kIsListed || in.R % 8 == 0) {
    const int vectors = in.R / 8;
    for (int i = thread_index(); i < rows.count * vectors; i += kThreads) {
      copy_8(i / vectors * C::kHiddenStride + i % vectors * 8, first + static_cast<int64_t>(i) * 8);
    }
  } else {
    for (int i = thread_index(); i < rows.count * in.R; i += kThreads) {
      copy_1(i / in.R * C::kHiddenStride + i % in.R, first + i);
    }
  }
}

template <class C>
__device__ __forceinline__ void store_hidden(const Call& in, Shared<C>& s, const TileRows& rows,
                                             void* memory) {
  using T = typename C::T;
  T* g_hidden = static_cast<T*>(memory);
  for_each_hidden<C>(
      in, rows, [&](int at, int64_t to) { store_16(g_hidden + to, load_16(s.hidden + at)); },
      [&](int at, int64_t to) { g_hidden[to] = s.hidden[at]; });
  sync_threads();  // all of it has been read before activate_hidden changes it
}

// Rows and ranks that do not exist become zeros.
template <class C>
__device__ __forceinline__ void load_hidden(const Call& in, Shared<C>& s, const TileRows& rows,
                                            const void* memory) {
  using T = typename C::T;
  const T* g_hidden = static_cast<const T*>(memory);
  const int ranks = rank_blocks_of<C>(in) * C::kRankBlock;
  if (rows.count < kBlockT || in.R < ranks) {
    for (int i = thread_index(); i < kBlockT * ranks; i += kThreads) {
      const int row = i / ranks, rank = i % ranks;
      if (row >= rows.count || rank >= in.R) {
        s.hidden[row * C::kHiddenStride + rank] = round_to<T>(0.0f);
      }
    }
  }
  for_each_hidden<C>(
      in, rows, [&](int at, int64_t from) { store_16(s.hidden + at, load_16(g_hidden + from)); },
      [&](int at, int64_t from) { s.hidden[at] = g_hidden[from]; });
  sync_threads();  // the tile is there
}

// hidden = phi(hidden), in place. Ranks that do not exist are zero, whatever phi is.
template <class C>
__device__ __forceinline__ void activate_hidden(const Call& in, Shared<C>& s) {
  using T = typename C::T;
  const int pairs = rank_blocks_of<C>(in) * C::kRankBlock / 2;
  with_activation(in.activation, [&](auto phi) {
    constexpr Activation kPhi = decltype(phi)::value;
#pragma unroll 1  // once for each tile and six activations: what it costs is code
    for (int i = thread_index(); i < kBlockT * pairs; i += kThreads) {
      const int column = i % pairs * 2;  // two neighbours are one 32-bit access
      T* at = &s.hidden[i / pairs * C::kHiddenStride + column];
      const Float2 h = unpack<T>(load_4(at));
      store_4(at, pack<T>(column < in.R ? activate(kPhi, h.low) : 0.0f,
                          column + 1 < in.R ? activate(kPhi, h.high) : 0.0f));
    }
  });
  sync_threads();  // the product that follows reads what other threads wrote
}

// Mean and deviation of each row of u = W_up phi(h) + b_up: the post-norm needs a whole row before
// it can scale its first element, so the up projection is done twice. The statistics are there
// behind the next barrier, the first one of the product that takes them.
template <class C>
__device__ __forceinline__ void measure_output(const Call& in, Shared<C>& s, const TileRows& rows,
                                               const void* w_up) {
  using T = typename C::T;
  const int64_t member = up_member_of(in, rows);
  Moments moments[2];  // of rows FragmentD::row(0) and row(2), this lane's columns
  auto measure = [&](int first, const FragmentD(&sums)[kChunk / 8]) {
    for (int half = 0; half < 2; ++half) {
      for (int n = 0; n < kChunk / 8; ++n) {
        const int column = first + 8 * n + FragmentD::column(0);
        if (column >= in.D) continue;
        float u[2] = {sums[n].r[2 * half], sums[n].r[2 * half + 1]};
        for (int e = 0; e < 2 && in.input[kBUp] != nullptr; ++e) {
          u[e] += load_parameter<T>(in.parameter(kBUp), member * in.D + column + e);
        }
        moments[half].merge(Moments::of(u));
      }
    }
  };
  project_to_columns<kUp, C>(in, s, w_up, member, measure);
  for (int half = 0; half < 2; ++half) {
    const Moments all = group_moments<4>(moments[half]);  // four lanes share a row
    if (FragmentD::column(0) != 0) continue;
    const int row = warp_index() * 16 + FragmentD::row(2 * half);
    s.out_mean[row] = all.mean;
    s.out_rstd[row] = all.reciprocal_deviation(in.post_norm_eps);
  }
}

}  // namespace pelt::gated_adapter
