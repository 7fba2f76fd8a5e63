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

#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {

template <class T_, int kRankBlock_, int kMaxRank_>
struct Config {
  using T = T_;
  static constexpr int kRankBlock = kRankBlock_;  // ranks whose sums are in registers at a time
  static constexpr int kRanks = kMaxRank_;        // ranks that fit in shared memory
  static constexpr int kHiddenStride = kRanks + kTilePad;
  static constexpr int kUpStride = kRankBlock + kTilePad;
  static constexpr int kOutStride = kChunk + 4;  // floats; 4 more keep the rows in other banks
  static constexpr int kRankTiles = kRankBlock / 8;
  static constexpr int kWeightElements = kRankBlock * kChunkStride > kChunk* kUpStride
                                             ? kRankBlock * kChunkStride
                                             : kChunk * kUpStride;
  // Blocks that share a multiprocessor's registers: left alone, the compiler goes for more of them
  // and spills.
  static constexpr int kMinBlocks = kMaxRank_ > 64 ? 2 : 3;
  static_assert(sizeof(T) == 2, "mma_m16n8k16 multiplies 16-bit elements");
  static_assert(kRankBlock % 16 == 0, "a rank block is a whole number of k steps of mma_m16n8k16");
  static_assert(kRanks % kRankBlock == 0, "the ranks are a whole number of rank blocks");
  static_assert(kRankBlock <= 128, "64 float sums a thread are what the registers hold");
};

template <class C>
struct Shared {
  using T = typename C::T;
  union {
    alignas(16) T x[kStages][kBlockT * kChunkStride];
    alignas(16) float out[kWarps][16 * C::kOutStride];  // a warp's rows of a chunk of columns
  };
  alignas(16) T weight[kStages][C::kWeightElements];  // of W_down [rank block, chunk], W_up [chunk,
                                                      // rank block]
  alignas(16) T rider[kStages][8 * kChunkStride];     // row 0; the others stay zero
  alignas(16) T hidden[kBlockT * C::kHiddenStride];   // h, phi(h) or dh
  RowState rows;
  float dot[kBlockT];  // backward: dy . dropout(post_norm(u))
  float sum[kBlockT];  // backward: a norm's two sums over a row
  float dot_hat[kBlockT];
  float out_mean[kBlockT];  // of the adapter's output, with a post-norm
  float out_rstd[kBlockT];
  float pooled[2];  // sum over the sentence's tiles: of gates or of dots, of rows that count
  int live_rows;
};

template <class C>
__device__ __forceinline__ int rank_blocks_of(const Inputs& in) {
  return (in.R + C::kRankBlock - 1) / C::kRankBlock;
}

// One more row of the weight in project_to_ranks, whose products cost one mma for each 16 columns:
// the gate's weight in forward, the bias of the up projection in backward.
struct Rider {
  Parameter row;
  int64_t offset;
  bool is_there;
};

// The unused rows of the riders' tiles; once, before the first product.
template <class C>
__device__ __forceinline__ void clear_rider(Shared<C>& s) {
  constexpr int kVectorsOfRider = kStages * 8 * kChunkStride / 8;
  for (int i = thread_index(); i < kVectorsOfRider; i += kThreads) {
    store_16(&s.rider[0][0] + 8 * i, Words4{});
  }
}

// W_down lies as [R, D], W_up as [D, R]; a tile keeps the order of memory.
enum Weight { kDown, kUp };

template <Weight kWeight, class C>
__device__ __forceinline__ void stage_weight_tile(const Inputs& in, Shared<C>& s,
                                                  const Parameter& weight, int64_t member,
                                                  int first, int rank, int stage) {
  using T = typename C::T;
  const int64_t start = member * in.R * in.D;
  if constexpr (kWeight == kDown) {
    stage_weight<T, C::kRankBlock, kChunk>(
        s.weight[stage], kChunkStride, weight,
        {start + static_cast<int64_t>(rank) * in.D + first, in.D, in.R - rank, in.D - first});
  } else {
    stage_weight<T, kChunk, C::kRankBlock>(
        s.weight[stage], C::kUpStride, weight,
        {start + static_cast<int64_t>(first) * in.R + rank, in.R, in.D - first, in.R - rank});
  }
}

// For each rank block: finish(first rank, sums of this warp's [16, rank block]). stage_rows(tile,
// first column) brings a chunk of the left operand. Returns the rider's products (column 0).
template <Weight kWeight, class C, class StageRows, class Finish>
__device__ __forceinline__ FragmentD project_to_ranks(const Inputs& in, Shared<C>& s,
                                                      const Parameter& weight, int64_t member,
                                                      const Rider& rider, StageRows&& stage_rows,
                                                      Finish&& finish) {
  using T = typename C::T;
  const int chunks = (in.D + kChunk - 1) / kChunk;
  const int steps = rank_blocks_of<C>(in) * chunks;
  auto stage = [&](int step) {
    if (step < steps) {
      const int first = step % chunks * kChunk;
      stage_rows(s.x[step % kStages], first);
      stage_weight_tile<kWeight, C>(in, s, weight, member, first, step / chunks * C::kRankBlock,
                                    step % kStages);
      if (rider.is_there && step < chunks) {
        stage_weight<T, 1, kChunk>(s.rider[step % kStages], kChunkStride, rider.row,
                                   {rider.offset + first, in.D, 1, in.D - first});
      }
    }
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) stage(step);

  FragmentD sums[C::kRankTiles];
  FragmentD rider_sums;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    sync_threads();
    stage(step + kStages - 1);  // into the buffer that was used up before the barrier
    const T* rows = s.x[step % kStages] + warp_index() * 16 * kChunkStride;
    const T* tile = s.weight[step % kStages];
    for (int k = 0; k < kChunk; k += 16) {
      const FragmentA a = load_a(rows + k, kChunkStride);
      for (int n = 0; n < C::kRankTiles; n += 2) {
        FragmentB b[2];
        if constexpr (kWeight == kDown) {
          load_b_pair(b, tile + 8 * n * kChunkStride + k, kChunkStride);
        } else {
          load_b_pair_transposed(b, tile + k * C::kUpStride + 8 * n, C::kUpStride);
        }
        multiply_add<T>(sums[n], a, b[0]);
        multiply_add<T>(sums[n + 1], a, b[1]);
      }
      if (rider.is_there && step < chunks) {
        multiply_add<T>(rider_sums, a, load_b(s.rider[step % kStages] + k, kChunkStride));
      }
    }
    if (step % chunks == chunks - 1) {
      finish(step / chunks * C::kRankBlock, sums);
      for (FragmentD& sum : sums) sum = FragmentD{};
    }
  }
  sync_threads();
  return rider_sums;
}

// For each chunk of 64 columns: visit(first column, sums of this warp's [16, 64]), from s.hidden.
template <Weight kWeight, class C, class Visit>
__device__ __forceinline__ void project_to_columns(const Inputs& in, Shared<C>& s,
                                                   const Parameter& weight, int64_t member,
                                                   Visit&& visit) {
  using T = typename C::T;
  const int rank_blocks = rank_blocks_of<C>(in);
  const int steps = (in.D + kChunk - 1) / kChunk * rank_blocks;
  auto stage = [&](int step) {
    if (step < steps) {
      stage_weight_tile<kWeight, C>(in, s, weight, member, step / rank_blocks * kChunk,
                                    step % rank_blocks * C::kRankBlock, step % kStages);
    }
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) stage(step);

  FragmentD sums[kChunk / 8];
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    sync_threads();
    stage(step + kStages - 1);
    const int rank = step % rank_blocks * C::kRankBlock;
    const T* hidden = s.hidden + warp_index() * 16 * C::kHiddenStride + rank;
    const T* tile = s.weight[step % kStages];
    for (int k = 0; k < C::kRankBlock; k += 16) {
      const FragmentA a = load_a(hidden + k, C::kHiddenStride);
      for (int n = 0; n < kChunk / 8; n += 2) {
        FragmentB b[2];
        if constexpr (kWeight == kUp) {
          load_b_pair(b, tile + 8 * n * C::kUpStride + k, C::kUpStride);
        } else {
          load_b_pair_transposed(b, tile + k * kChunkStride + 8 * n, kChunkStride);
        }
        multiply_add<T>(sums[n], a, b[0]);
        multiply_add<T>(sums[n + 1], a, b[1]);
      }
    }
    if (step % rank_blocks == rank_blocks - 1) {
      visit(step / rank_blocks * kChunk, sums);
      for (FragmentD& sum : sums) sum = FragmentD{};
    }
  }
  sync_threads();
}

// Fragments leave through shared memory: a lane then has eight neighbouring columns, so that rows
// come and go in 16-byte accesses. visit(turn, row of the tile, column, values) is for what exists;
// the row is that of lane / 8 + 4 turn in the warp's 16, the column that of lane % 8.
template <class C, class Visit>
__device__ __forceinline__ void for_each_8(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                           int first, const FragmentD (&sums)[kChunk / 8],
                                           Visit&& visit) {
  float* out = s.out[warp_index()];  // [16, kChunk]
  sync_warp();                       // the chunk before has been read
  for (int n = 0; n < kChunk / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      out[FragmentD::row(i) * C::kOutStride + 8 * n + FragmentD::column(i)] = sums[n].r[i];
    }
  }
  sync_warp();
  const int column = lane_index() % kVectors * 8;
#pragma unroll
  for (int turn = 0; turn < 4; ++turn) {
    const int row = lane_index() / kVectors + 4 * turn;
    if (warp_index() * 16 + row >= rows.count || first + column >= in.D) continue;
    Float8 values;
    for (int e = 0; e < 8; ++e) values.v[e] = out[row * C::kOutStride + column + e];
    visit(turn, warp_index() * 16 + row, first + column, values);
  }
}

// Copies a tile of h or dh between shared memory and a global [B * S, R].
template <bool kStores, class C>
__device__ __forceinline__ void move_hidden(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                            void* memory) {
  using T = typename C::T;
  T* tile = static_cast<T*>(memory) + rows.first * in.R;
  const int vectors = in.R / 8;
  if (in.R % 8 == 0) {
    for (int i = thread_index(); i < rows.count * vectors; i += kThreads) {
      T* shared = s.hidden + i / vectors * C::kHiddenStride + i % vectors * 8;
      T* global = tile + static_cast<int64_t>(i) * 8;
      if (kStores) store_16(global, load_16(shared));
      if (!kStores) store_16(shared, load_16(global));
    }
  } else {
    for (int i = thread_index(); i < rows.count * in.R; i += kThreads) {
      T* shared = s.hidden + i / in.R * C::kHiddenStride + i % in.R;
      if (kStores) tile[i] = *shared;
      if (!kStores) *shared = tile[i];
    }
  }
  sync_threads();
}

template <class C>
__device__ __forceinline__ void store_hidden(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                             void* memory) {
  move_hidden</*kStores=*/true, C>(in, s, rows, memory);
}

template <class C>
__device__ __forceinline__ void load_hidden(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                            const void* memory) {
  move_hidden</*kStores=*/false, C>(in, s, rows, const_cast<void*>(memory));
}

// hidden = phi(hidden), in place. Ranks that do not exist are zero, whatever phi is.
template <class C>
__device__ __forceinline__ void activate_hidden(const Inputs& in, Shared<C>& s) {
  using T = typename C::T;
  const int pairs = rank_blocks_of<C>(in) * C::kRankBlock / 2;
  with_activation(in.activation, [&](auto phi) {
    constexpr Activation kPhi = decltype(phi)::value;
    for (int i = thread_index(); i < kBlockT * pairs; i += kThreads) {
      const int column = i % pairs * 2;
      T* at = &s.hidden[i / pairs * C::kHiddenStride + column];
      const Float2 h = unpack<T>(load_4(at));
      store_4(at, pack<T>(column < in.R ? activate(kPhi, h.low) : 0.0f,
                          column + 1 < in.R ? activate(kPhi, h.high) : 0.0f));
    }
  });
  sync_threads();
}

// Mean and deviation of each row of u = W_up phi(h) + b_up: the post-norm needs a whole row before
// it can scale its first element, so the up projection is done twice.
template <class C>
__device__ __forceinline__ void measure_output(const Inputs& in, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const int64_t member =
      member_of(in.up_index, in.has_up_index_per_sample, rows.group, in.up_members);
  Moments moments[2];  // of rows FragmentD::row(0) and row(2), this lane's columns
  project_to_columns<kUp, C>(in, s, in.w_up, member,
                             [&](int first, const FragmentD(&sums)[kChunk / 8]) {
                               for (int half = 0; half < 2; ++half) {
                                 for (int n = 0; n < kChunk / 8; ++n) {
                                   const int column = first + 8 * n + FragmentD::column(0);
                                   if (column >= in.D) continue;
                                   float u[2] = {sums[n].r[2 * half], sums[n].r[2 * half + 1]};
                                   for (int e = 0; e < 2 && in.b_up.data != nullptr; ++e) {
                                     u[e] += load_parameter<T>(in.b_up, member * in.D + column + e);
                                   }
                                   moments[half].merge(Moments::of(u));
                                 }
                               }
                             });
  for (int half = 0; half < 2; ++half) {
    const Moments all = group_moments<4>(moments[half]);
    if (FragmentD::column(0) != 0) continue;
    const int row = warp_index() * 16 + FragmentD::row(2 * half);
    s.out_mean[row] = all.mean;
    s.out_rstd[row] = all.reciprocal_deviation(in.post_norm_eps);
  }
  sync_threads();
}

// Leaves the tile's two sums and arrives at its sentence. Called by the first warp.
__device__ __forceinline__ void publish_sums(float* partial, int* arrivals, const TileRows& rows,
                                             int tile, float sum, float count) {
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane_index() != 0) return;
  partial[2 * tile] = sum;
  partial[2 * tile + 1] = count;
  atomic_add_release(arrivals + rows.group, 1);
}

// Waits for the sentence's other tiles and adds what they left, in their order, into s.pooled.
template <class C>
__device__ __forceinline__ void await_sums(const Tiling& tiling, const float* partial,
                                           const int* arrivals, Shared<C>& s,
                                           const TileRows& rows) {
  const int tiles = tiling.tiles_per_group;
  if (thread_index() == 0) wait_until_at_least(arrivals + rows.group, tiles);
  sync_threads();
  if (warp_index() == 0) {
    float sum = 0.0f, count = 0.0f;
    const float* first = partial + 2 * static_cast<int64_t>(rows.group) * tiles;
    for (int i = lane_index(); i < tiles; i += 32) {
      sum += first[2 * i];
      count += first[2 * i + 1];
    }
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (lane_index() == 0) {
      s.pooled[0] = sum;
      s.pooled[1] = count > 1.0f ? count : 1.0f;  // a sentence may have no row that counts
    }
  }
  sync_threads();
}

// Whole sentences that the blocks of a cooperative launch take together. A sentence with more tiles
// than there are blocks is a wave of its own, in which blocks have several tiles.
inline int wave_of(const Tiling& tiling, int blocks) {
  const int groups = blocks / tiling.tiles_per_group;
  return (groups > 1 ? groups : 1) * tiling.tiles_per_group;
}

}  // namespace pelt::gated_adapter
