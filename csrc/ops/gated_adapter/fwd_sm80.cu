// gated_adapter, forward, one launch:
//   h = W_down pre_norm(x) + b_down,  y = residual + scale g dropout(post_norm(W_up phi(h) + b_up))
//
// A block of 4 warps takes kBlockT = 64 rows, a warp 16 of them:
//
//        x [64, D]  in chunks of 64 columns         W_up in chunks of 64 rows
//        |##|  |  |  |  |  |  --> h [64, R] -->  |  |  |##|  |  |  |  y [64, D]
//        W_down in chunks of 64 columns
//
// A ring of three buffers holds the chunks that cp.async brings. Ranks above the rank block (128)
// take several turns over x, which comes from L2 then. h is rounded to the activation's type before
// phi sees it, so that backward, which reads it from memory, uses the same numbers.
//
// The learned gate is one more row of W_down: its logit costs one mma for each 16 columns. A gate
// pooled over the sentence needs all of its tiles before it can scale anything: each tile leaves
// its partial sum and arrives at the sentence's counter, then waits for the others and adds the
// partial sums in their order. The launch is cooperative and blocks take whole sentences together
// (a wave), first all down projections, then all up projections, so nobody waits for a tile that is
// not being worked on. x is read once from memory, and once more from L2 when it is also the
// residual.
//
// Shared memory per block, R <= 16, 48, 64, 128, 512: 44, 58, 69, 105, 155 KB.
//
// Why so: T rows are 2 D bytes in and out for 4 D R operations, which is memory-bound below R =
// 180. The schedule keeps x moving (two chunks in flight for each of several blocks on a
// multiprocessor) and touches it once; nothing of size [T, D] exists between x and y.
#include "common/type_list.h"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {
namespace {

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
    alignas(16) float out[kWarps][16 * C::kOutStride];  // a warp's rows of a chunk of y
  };
  alignas(16) T weight[kStages][C::kWeightElements];  // of W_down [rank block, chunk], W_up [chunk,
                                                      // rank block]
  alignas(16) T gate_weight[kStages][8 * kChunkStride];  // row 0; the others stay zero
  alignas(16) T hidden[kBlockT * C::kHiddenStride];      // h, then phi(h)
  RowState rows;
  float out_mean[kBlockT];  // of the adapter's output, with a post-norm
  float out_rstd[kBlockT];
  float pooled_gate;
  int live_rows;
};

template <class C>
__device__ __forceinline__ int rank_blocks_of(const Inputs& in) {
  return (in.R + C::kRankBlock - 1) / C::kRankBlock;
}

template <class C>
__device__ __forceinline__ void clear_gate_weight(Shared<C>& s) {
  constexpr int kVectors16 = kStages * 8 * kChunkStride / 8;
  for (int i = thread_index(); i < kVectors16; i += kThreads) {
    store_16(&s.gate_weight[0][0] + 8 * i, Words4{});
  }
}

// One chunk of x, of W_down and, riding along, of the gate's weight.
template <class C>
__device__ __forceinline__ void stage_down(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                           int64_t member, int rank, int first, int stage,
                                           bool rides_gate) {
  using T = typename C::T;
  stage_x(s.x[stage], in, rows, s.rows, first);
  const int columns = in.D - first;
  stage_weight<T, C::kRankBlock, kChunk>(
      s.weight[stage], kChunkStride, in.w_down,
      {(member * in.R + rank) * in.D + first, in.D, in.R - rank, columns});
  if (rides_gate) {
    stage_weight<T, 1, kChunk>(s.gate_weight[stage], kChunkStride, in.gate_weight,
                               {first, in.D, 1, columns});
  }
}

// h + b_down of one rank block, from the warps' registers to shared memory.
template <class C>
__device__ __forceinline__ void put_hidden(const Inputs& in, Shared<C>& s, int64_t member, int rank,
                                           const FragmentD (&sums)[C::kRankTiles]) {
  using T = typename C::T;
  for (int n = 0; n < C::kRankTiles; ++n) {
    for (int half = 0; half < 2; ++half) {
      const int row = warp_index() * 16 + FragmentD::row(2 * half);
      const int column = rank + 8 * n + FragmentD::column(0);
      float value[2];
      for (int e = 0; e < 2; ++e) {
        const bool has_bias = in.b_down.data != nullptr && column + e < in.R;
        const float bias =
            has_bias ? load_parameter<T>(in.b_down, member * in.R + column + e) : 0.0f;
        value[e] = sums[n].r[2 * half + e] + bias;
      }
      store_4(&s.hidden[row * C::kHiddenStride + column], pack<T>(value[0], value[1]));
    }
  }
}

// hidden = W_down pre_norm(x) + b_down; and the gate's logits, where they ride along.
template <class C>
__device__ __forceinline__ void project_down(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                             bool rides_gate) {
  using T = typename C::T;
  const int64_t member = member_of(in.down_index, in.has_down_index_per_sample, rows.group);
  const int chunks = (in.D + kChunk - 1) / kChunk;
  const int steps = rank_blocks_of<C>(in) * chunks;
  auto stage = [&](int step) {
    if (step < steps) {
      stage_down(in, s, rows, member, step / chunks * C::kRankBlock, step % chunks * kChunk,
                 step % kStages, rides_gate && step < chunks);
    }
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) stage(step);

  FragmentD sums[C::kRankTiles];
  FragmentD logits;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    sync_threads();
    stage(step + kStages - 1);  // into the buffer that was used up before the barrier
    const T* x = s.x[step % kStages] + warp_index() * 16 * kChunkStride;
    const T* weight = s.weight[step % kStages];
    for (int k = 0; k < kChunk; k += 16) {
      const FragmentA a = load_a(x + k, kChunkStride);
      for (int n = 0; n < C::kRankTiles; n += 2) {
        FragmentB b[2];
        load_b_pair(b, weight + 8 * n * kChunkStride + k, kChunkStride);
        multiply_add<T>(sums[n], a, b[0]);
        multiply_add<T>(sums[n + 1], a, b[1]);
      }
      if (rides_gate && step < chunks) {
        multiply_add<T>(logits, a, load_b(s.gate_weight[step % kStages] + k, kChunkStride));
      }
    }
    if (step % chunks == chunks - 1) {
      put_hidden<C>(in, s, member, step / chunks * C::kRankBlock, sums);
      for (FragmentD& sum : sums) sum = FragmentD{};
    }
  }
  if (rides_gate && FragmentD::column(0) == 0) {
    const float bias = load_parameter<T>(in.gate_bias, 0);
    s.rows.logit[warp_index() * 16 + FragmentD::row(0)] = logits.r[0] + bias;
    s.rows.logit[warp_index() * 16 + FragmentD::row(2)] = logits.r[2] + bias;
  }
  sync_threads();
}

// Copies h between shared and global memory: out after the down projection, in for a tile that
// comes back to its up projection later.
template <bool kStores, class C>
__device__ __forceinline__ void move_hidden(const ForwardParams& p, Shared<C>& s,
                                            const TileRows& rows) {
  using T = typename C::T;
  const int R = p.in.R;
  T* g_h = static_cast<T*>(p.h) + rows.first * R;  // [B * S, R]
  if (R % 8 == 0) {
    for (int i = thread_index(); i < rows.count * (R / 8); i += kThreads) {
      T* shared = s.hidden + i / (R / 8) * C::kHiddenStride + i % (R / 8) * 8;
      T* global = g_h + static_cast<int64_t>(i) * 8;
      if (kStores) store_16(global, load_16(shared));
      if (!kStores) store_16(shared, load_16(global));
    }
  } else {
    for (int i = thread_index(); i < rows.count * R; i += kThreads) {
      T* shared = s.hidden + i / R * C::kHiddenStride + i % R;
      if (kStores) g_h[i] = *shared;
      if (!kStores) *shared = g_h[i];
    }
  }
  sync_threads();
}

// hidden = phi(hidden), in place. Ranks that do not exist are zero, whatever phi is.
template <class C>
__device__ __forceinline__ void activate_hidden(const Inputs& in, Shared<C>& s) {
  using T = typename C::T;
  const int pairs = rank_blocks_of<C>(in) * C::kRankBlock / 2;
  for (int i = thread_index(); i < kBlockT * pairs; i += kThreads) {
    const int column = i % pairs * 2;
    T* at = &s.hidden[i / pairs * C::kHiddenStride + column];
    const Float2 h = unpack<T>(load_4(at));
    store_4(at, pack<T>(column < in.R ? activate(in.activation, h.low) : 0.0f,
                        column + 1 < in.R ? activate(in.activation, h.high) : 0.0f));
  }
  sync_threads();
}

// For each chunk of 64 columns: visit(first column, sums of this warp's [16, 64] of W_up phi(h)).
template <class C, class Visit>
__device__ __forceinline__ void project_up(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                           Visit&& visit) {
  using T = typename C::T;
  const int64_t member = member_of(in.up_index, in.has_up_index_per_sample, rows.group);
  const int rank_blocks = rank_blocks_of<C>(in);
  const int steps = (in.D + kChunk - 1) / kChunk * rank_blocks;
  auto stage = [&](int step) {
    const int first = step / rank_blocks * kChunk, rank = step % rank_blocks * C::kRankBlock;
    if (step < steps) {
      stage_weight<T, kChunk, C::kRankBlock>(
          s.weight[step % kStages], C::kUpStride, in.w_up,
          {(member * in.D + first) * in.R + rank, in.R, in.D - first, in.R - rank});
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
    for (int k = 0; k < C::kRankBlock; k += 16) {
      const FragmentA a = load_a(hidden + k, C::kHiddenStride);
      for (int n = 0; n < kChunk / 8; n += 2) {
        FragmentB b[2];
        load_b_pair(b, s.weight[step % kStages] + 8 * n * C::kUpStride + k, C::kUpStride);
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

// Mean and deviation of each row of u = W_up phi(h) + b_up: the post-norm needs a whole row before
// it can scale its first element, so the up projection is done twice.
template <class C>
__device__ __forceinline__ void measure_output(const Inputs& in, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const int64_t member = member_of(in.up_index, in.has_up_index_per_sample, rows.group);
  Moments moments[2];  // of rows FragmentD::row(0) and row(2), this lane's columns
  project_up<C>(in, s, rows, [&](int first, const FragmentD(&sums)[kChunk / 8]) {
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

// Eight neighbouring elements of residual + scale g dropout(post_norm(u)).
template <class C>
__device__ __forceinline__ void store_y_8(const ForwardParams& p, const Shared<C>& s,
                                          const TileRows& rows, int64_t member, int row, int column,
                                          Float8 u) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int64_t at = (rows.first + row) * in.D + column;
  if (in.b_up.data != nullptr) {
    const Float8 bias = load_parameter_8<T>(in.b_up, member * in.D + column);
    for (int e = 0; e < 8; ++e) u.v[e] += bias.v[e];
  }
  if (in.has_post_norm()) {
    const Float8 weight = load_parameter_8<T>(in.post_norm_weight, column);
    const Float8 bias = load_parameter_8<T>(in.post_norm_bias, column);
    for (int e = 0; e < 8; ++e) {
      u.v[e] = (u.v[e] - s.out_mean[row]) * s.out_rstd[row] * weight.v[e] + bias.v[e];
    }
  }
  if (in.dropout.is_active()) {
    const Float8 factors = dropout_of(in, rows.first + row, column);
    for (int e = 0; e < 8; ++e) u.v[e] *= factors.v[e];
  }
  Float8 residual = {};
  if (in.residual_from != ResidualFrom::kNone) {
    const void* from = in.residual_from == ResidualFrom::kInput ? in.x : in.residual;
    residual = load_8(static_cast<const T*>(from) + at);
  }
  for (int e = 0; e < 8; ++e) u.v[e] = residual.v[e] + s.rows.factor[row] * u.v[e];
  store_16(static_cast<T*>(p.y) + at, narrow<T>(u));
}

// Fragments leave through shared memory: a lane then has eight neighbouring columns, so that the
// residual comes and y goes in 16-byte accesses.
template <class C>
__device__ __forceinline__ void store_y(const ForwardParams& p, Shared<C>& s,
                                        const TileRows& rows) {
  const int64_t member = member_of(p.in.up_index, p.in.has_up_index_per_sample, rows.group);
  float* out = s.out[warp_index()];  // [16, kChunk]
  project_up<C>(p.in, s, rows, [&](int first, const FragmentD(&sums)[kChunk / 8]) {
    sync_warp();  // the chunk before has been read
    for (int n = 0; n < kChunk / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        out[FragmentD::row(i) * C::kOutStride + 8 * n + FragmentD::column(i)] = sums[n].r[i];
      }
    }
    sync_warp();
    for (int i = lane_index(); i < 16 * kVectors; i += 32) {
      const int row = warp_index() * 16 + i / kVectors, column = i % kVectors * 8;
      if (row >= rows.count || first + column >= p.in.D) continue;
      Float8 u;
      for (int e = 0; e < 8; ++e) u.v[e] = out[i / kVectors * C::kOutStride + column + e];
      store_y_8<C>(p, s, rows, member, row, first + column, u);
    }
  });
}

// y = residual for a tile all of whose gates are below the threshold: no product is computed.
template <class C>
__device__ __forceinline__ void copy_residual(const ForwardParams& p, const TileRows& rows) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const void* from = in.residual_from == ResidualFrom::kInput ? in.x : in.residual;
  for (int i = thread_index(); i < rows.count * (in.D / 8); i += kThreads) {
    const int64_t at = rows.first * in.D + static_cast<int64_t>(i) * 8;
    Words4 words = {};
    if (in.residual_from != ResidualFrom::kNone) {
      words = load_global_16(static_cast<const T*>(from) + at);
    }
    store_16(static_cast<T*>(p.y) + at, words);
  }
}

// Leaves the tile's share of its sentence's gate, and arrives.
template <class C>
__device__ __forceinline__ void publish_gate(const ForwardParams& p, const Shared<C>& s,
                                             const TileRows& rows, int tile) {
  const Inputs& in = p.in;
  if (warp_index() != 0) return;
  float sum = 0.0f, count = 0.0f;
  for (int r = lane_index(); r < rows.count; r += 32) {
    const bool counts = in.pooling == Pooling::kMean || in.mask[rows.first + r];
    sum += counts ? sigmoid(s.rows.logit[r]) : 0.0f;
    count += counts ? 1.0f : 0.0f;
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane_index() != 0) return;
  p.gate_partial[2 * tile] = sum;
  p.gate_partial[2 * tile + 1] = count;
  atomic_add_release(p.arrivals + rows.group, 1);
}

// Waits for the sentence's other tiles and adds the shares, in their order. A sentence without a
// row that counts has the gate 0.
template <class C>
__device__ __forceinline__ void await_gate(const ForwardParams& p, Shared<C>& s,
                                           const TileRows& rows) {
  const int tiles = p.tiling.tiles_per_group;
  if (thread_index() == 0) wait_until_at_least(p.arrivals + rows.group, tiles);
  sync_threads();
  if (warp_index() == 0) {
    float sum = 0.0f, count = 0.0f;
    for (int i = lane_index(); i < tiles; i += 32) {
      const float* partial = p.gate_partial + 2 * (static_cast<int64_t>(rows.group) * tiles + i);
      sum += partial[0];
      count += partial[1];
    }
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (lane_index() == 0) {
      s.pooled_gate = sum / (count > 1.0f ? count : 1.0f);
      if (rows.index_in_group == 0) p.gate_value[rows.group] = s.pooled_gate;
    }
  }
  sync_threads();
}

// factor = scale g of each row, and whether any row of the tile is alive.
template <class C>
__device__ __forceinline__ void settle_factors(const ForwardParams& p, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const Inputs& in = p.in;
  if (warp_index() == 0) {
    const float scale = scale_of<T>(in);
    bool any_lives = false;
    for (int r = lane_index(); r < kBlockT; r += 32) {
      float gate = 0.0f;
      if (r < rows.count && in.has_pooled_gate()) {
        gate = s.pooled_gate;
      } else if (r < rows.count && in.has_learned_gate()) {
        gate = sigmoid(s.rows.logit[r]);
        p.gate_value[rows.first + r] = gate;
      } else if (r < rows.count) {
        gate = gate_of_row<T>(in, nullptr, rows.first + r);
      }
      const bool is_skipped = in.has_skip && gate < in.skip_below;
      any_lives |= r < rows.count && !is_skipped;
      s.rows.factor[r] = is_skipped ? 0.0f : scale * gate;
    }
    any_lives = vote_any(any_lives);
    if (lane_index() == 0) s.live_rows = any_lives ? 1 : 0;
  }
  sync_threads();
}

// What a tile still needs before its up projection.
enum class Hidden { kIsThere, kIsInMemory, kIsNotComputed };

template <class C>
__device__ __forceinline__ void finish_tile(const ForwardParams& p, Shared<C>& s,
                                            const TileRows& rows, Hidden hidden) {
  settle_factors<C>(p, s, rows);
  if (s.live_rows == 0) {
    copy_residual<C>(p, rows);
  } else {
    if (hidden == Hidden::kIsInMemory) move_hidden</*kStores=*/false, C>(p, s, rows);
    if (hidden == Hidden::kIsNotComputed) {
      if (p.in.has_pre_norm()) measure_rows<typename C::T>(p.in, rows, s.rows, false);
      sync_threads();
      project_down<C>(p.in, s, rows, /*rides_gate=*/false);
      move_hidden</*kStores=*/true, C>(p, s, rows);
    }
    activate_hidden<C>(p.in, s);
    if (p.in.has_post_norm()) measure_output<C>(p.in, s, rows);
    store_y<C>(p, s, rows);
  }
  sync_threads();
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    gated_adapter_fwd_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Tiling& tiling = p.tiling;
  const bool is_learned = p.in.has_learned_gate();
  const bool is_pooled = p.in.has_pooled_gate();
  // A gate that decides whether to project at all must be known before; and beside a pre-norm the
  // tile in shared memory is not x.
  const bool projects_late = p.in.has_skip;
  const bool rides_gate = is_learned && !projects_late && !p.in.has_pre_norm();
  const bool measures = p.in.has_pre_norm() || (is_learned && !rides_gate);
  clear_gate_weight<C>(s);
  sync_threads();

  for (int wave = 0; wave < tiling.tiles; wave += tiling.wave_tiles) {
    const int end =
        wave + tiling.wave_tiles < tiling.tiles ? wave + tiling.wave_tiles : tiling.tiles;
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile(tiling, tile);
      if (measures) {
        measure_rows<typename C::T>(p.in, rows, s.rows, is_learned && !rides_gate);
        sync_threads();
      }
      if (!projects_late) {
        project_down<C>(p.in, s, rows, rides_gate);
        move_hidden</*kStores=*/true, C>(p, s, rows);
      }
      if (is_pooled) {
        publish_gate<C>(p, s, rows, tile);
      } else {
        finish_tile<C>(p, s, rows, projects_late ? Hidden::kIsNotComputed : Hidden::kIsThere);
      }
      sync_threads();
    }
    if (!is_pooled) continue;
    const bool has_several = end - wave > grid_blocks_x();
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile(tiling, tile);
      await_gate<C>(p, s, rows);
      finish_tile<C>(p, s, rows,
                     projects_late ? Hidden::kIsNotComputed
                                   : (has_several ? Hidden::kIsInMemory : Hidden::kIsThere));
    }
  }
}

// Dtype and smallest rank that fits.
using Configs = TypeList<Config<bf16, 16, 16>, Config<bf16, 48, 48>, Config<bf16, 64, 64>,
                         Config<bf16, 128, 128>, Config<bf16, 128, 512>, Config<f16, 16, 16>,
                         Config<f16, 48, 48>, Config<f16, 64, 64>, Config<f16, 128, 128>,
                         Config<f16, 128, 512>>;

template <class C>
void launch_config(ForwardParams& p, void* workspace, Stream stream) {
  constexpr auto kKernel = gated_adapter_fwd_sm80<C>;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<C>);
  const int resident = resident_blocks<kKernel>(kThreads, shape.shared_bytes);
  shape.blocks_x = p.tiling.tiles < resident ? p.tiling.tiles : resident;
  shape.is_cooperative = p.in.has_pooled_gate();
  p.tiling.wave_tiles = p.tiling.tiles;
  if (p.in.has_pooled_gate()) {
    const int whole_groups = shape.blocks_x / p.tiling.tiles_per_group;
    p.tiling.wave_tiles = (whole_groups > 1 ? whole_groups : 1) * p.tiling.tiles_per_group;
    p.arrivals = static_cast<int*>(workspace);
    p.gate_partial = reinterpret_cast<float*>(p.arrivals + p.in.B);
    zero_async(p.arrivals, sizeof(int) * p.in.B, stream);
  }
  launch<kKernel>("gated_adapter_fwd_sm80", shape, stream, p);
}

}  // namespace

Tiling make_tiling(const Inputs& in) {
  Tiling tiling;
  const bool is_per_sentence =
      in.has_pooled_gate() || in.has_down_index_per_sample || in.has_up_index_per_sample;
  tiling.groups = is_per_sentence ? in.B : 1;
  tiling.group_rows = is_per_sentence ? in.S : static_cast<int64_t>(in.B) * in.S;
  tiling.tiles_per_group = static_cast<int>((tiling.group_rows + kBlockT - 1) / kBlockT);
  tiling.tiles = tiling.groups * tiling.tiles_per_group;
  tiling.wave_tiles = tiling.tiles;
  return tiling;
}

int64_t forward_workspace_bytes(const Inputs& in) {
  if (!in.has_pooled_gate()) return 0;
  return static_cast<int64_t>(sizeof(int)) * in.B + 2 * sizeof(float) * make_tiling(in).tiles;
}

void launch_gated_adapter_fwd_sm80(ForwardParams p, void* workspace, Stream stream) {
  p.tiling = make_tiling(p.in);
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && p.in.R <= C::kRanks;
      },
      [&](auto tag) { launch_config<typename decltype(tag)::type>(p, workspace, stream); });
  check(found, "gated_adapter_fwd_sm80: expected bfloat16 or float16 and R <= ", kMaxRank, ", got ",
        name_of(p.in.dtype), " and R=", p.in.R);
}

}  // namespace pelt::gated_adapter
