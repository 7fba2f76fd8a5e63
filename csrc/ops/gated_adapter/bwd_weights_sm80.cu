// gated_adapter, backward, second of two launches: the sums over rows.
//
//   dW_down = dhᵀ pre_norm(x)   [R, D]       db_down = sum of dh        dw_gate = sum of dlogit x
//   dW_upᵀ  = phi(h)ᵀ du        [R, D]       db_up   = sum of du        du = scale g dropout(dy)
//
// A block owns a tile of both weights' gradients, a block of ranks by 64 columns, and a part of the
// rows (a split); it goes over them 64 at a time:
//
//        dh, phi(h) [64, ranks]  x  x, du [64, 64]   -->  two tiles [ranks, 64] in registers
//
// x and dy are read a second time here, because a sum over rows cannot start before a row's dh, and
// two tiles of a block's partial sums do not fit beside forward's shared memory. The vectors [D]
// and [R] are added up by the threads that bring the rows in, in float32.
//
// Blocks leave their partial sums in memory; the one that draws the last ticket of a tile adds the
// splits in their order, so the result does not depend on which block that was. With banks, a block
// works for one member and passes over the rows of others; members that nobody used get zeros.
// One more layer of blocks adds up what is left: gradients of the norms, of scale and of a given
// gate.
//
// Shared memory per block, rank block 16, 64: 26, 38 KB.
#include "common/check.h"
#include "ops/gated_adapter/configs.h"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {
namespace {

template <class T_, int kRankBlock_>
struct Config {
  using T = T_;
  static constexpr int kRankBlock = kRankBlock_;
  static constexpr int kRankStride = kRankBlock + kTilePad;  // elements from row to row of dh
  static constexpr int kRankVectors = kRankBlock / 8;        // of 16 bytes in a row
  // The warps stand side by side over a tile [ranks, 64]: a warp has 16 ranks, the rows of an mma,
  // and a part of the columns.
  static constexpr int kWarpsOverRanks = kRankBlock / 16;
  static constexpr int kWarpColumns = kChunk / (kWarps / kWarpsOverRanks);
  static constexpr int kTileFloats = kRankBlock * kChunk;
  static constexpr int kPartialFloats = partial_floats(kRankBlock);
  static_assert(kWarps % kWarpsOverRanks == 0, "the warps divide the tile evenly");
  static_assert(kWarpColumns % 16 == 0, "fragments of B come in pairs of 8 columns");
};

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(16) T x[kBlockT * kChunkStride];         // pre_norm(x), [rows, columns]
  alignas(16) T du[kBlockT * kChunkStride];        // [rows, columns]
  alignas(16) T dh[kBlockT * C::kRankStride];      // [rows, ranks]
  alignas(16) T a[kBlockT * C::kRankStride];       // phi(h), [rows, ranks]
  float sums[kWarps][2 * kChunk + C::kRankBlock];  // a warp's share of db_up, dw_gate, db_down
  float scalar[kWarps];                            // a warp's share of a sum over all rows
  int is_last;                                     // the block that adds the splits
};

// The tile of the gradients and the part of the rows that a block works on.
struct Work {
  int column;  // the first one
  int rank;
  int member;
  int split;
  int64_t tile;  // its number among all tiles of the gradients
};

// Which of the sums a tile of rows belongs to.
struct Wanted {
  bool down;
  bool up;
  bool gate;
};

// This thread's shares of the vectors' gradients: its eight columns, its eight ranks.
struct VectorSums {
  Float8 db_up = {};
  Float8 dw_gate = {};
  Float8 db_down = {};
};

__device__ __forceinline__ float read_scalar(const BackwardParams& p, RowScalar which,
                                             int64_t row) {
  return p.row_scalars[which * rows_of(p.in) + row];
}

// x and du, [64, 64] from column `work.column` on; absent rows and columns are zero.
template <class C>
__device__ __forceinline__ void bring_columns(const BackwardParams& p, Shared<C>& s,
                                              const TileRows& rows, const Work& work,
                                              const Wanted& wanted, VectorSums& sums) {
  using T = typename C::T;
  const Call& in = p.in;
  const int column = work.column + thread_index() % kVectors * 8;
  for (int r = thread_index() / kVectors; r < kBlockT; r += kThreads / kVectors) {
    // What the tile of rows has no part in is staged as zeros too: a NaN there stays there.
    Float8 x = {}, du = {};
    const int64_t row = rows.first + r, at = row * in.D + column;
    const bool is_there = r < rows.count && column < in.D;
    if (is_there && (wanted.down || wanted.gate)) x = load_8(in.input_as<T>(kX) + at);
    if (is_there && wanted.gate) {  // the gate sees x before the norm
      const float dlogit = read_scalar(p, kDLogit, row);
      // In float32: a pooled gate's dlogit is small enough to vanish in float16.
      for (int e = 0; e < 8; ++e) sums.dw_gate.v[e] += dlogit * x.v[e];
    }
    if (is_there && wanted.down && has_pre_norm(in)) {
      // Normed again, as the down projection took it.
      const float mean = read_scalar(p, kMean, row), rstd = read_scalar(p, kRstd, row);
      const Float8 weight = load_parameter_8<T>(in.parameter(kPreNormWeight), column);
      const Float8 bias = load_parameter_8<T>(in.parameter(kPreNormBias), column);
      for (int e = 0; e < 8; ++e) x.v[e] = (x.v[e] - mean) * rstd * weight.v[e] + bias.v[e];
    }
    if (is_there && wanted.up) {
      du = load_8(static_cast<const T*>(has_post_norm(in) ? p.du : in.doutput[kY]) + at);
      const bool drops = in.dropout.is_active() && !has_post_norm(in);
      const Float8 factors = drops ? dropout_of_row(in, row, column) : Float8{};
      const float factor = read_scalar(p, kFactor, row);  // scale g
      for (int e = 0; e < 8; ++e) {
        du.v[e] *= drops ? factor * factors.v[e] : factor;
        sums.db_up.v[e] += du.v[e];  // before du is rounded for the product
      }
    }
    store_16(&s.x[r * kChunkStride + column - work.column], narrow<T>(x));
    store_16(&s.du[r * kChunkStride + column - work.column], narrow<T>(du));
  }
}

// Eight neighbouring ranks of a row of [B * S, R]; those that do not exist are zero.
template <class T>
__device__ __forceinline__ Float8 load_ranks(const void* source, int R, int64_t row, int rank) {
  const T* from = static_cast<const T*>(source) + row * R + rank;
  Float8 values = {};
  if (R % 8 == 0) {  // rows start at 16-byte borders
    if (rank < R) values = load_8(from);
  } else {
    for (int e = 0; e < 8; ++e) {
      if (rank + e < R) values.v[e] = to_float(from[e]);
    }
  }
  return values;
}

// dh and phi(h), [64, ranks] from rank `work.rank` on.
template <class C>
__device__ __forceinline__ void bring_ranks(const BackwardParams& p, Shared<C>& s,
                                            const TileRows& rows, const Work& work,
                                            const Wanted& wanted, VectorSums& sums) {
  using T = typename C::T;
  const int offset = thread_index() % C::kRankVectors * 8;  // of this thread's eight ranks
  for (int r = thread_index() / C::kRankVectors; r < kBlockT; r += kThreads / C::kRankVectors) {
    Float8 dh = {}, a = {};
    if (r < rows.count && wanted.down) {
      dh = load_ranks<T>(p.dh, p.in.R, rows.first + r, work.rank + offset);
      for (int e = 0; e < 8; ++e) sums.db_down.v[e] += dh.v[e];
    }
    if (r < rows.count && wanted.up) {
      a = load_ranks<T>(p.in.output[kH], p.in.R, rows.first + r, work.rank + offset);
      for (int e = 0; e < 8; ++e) {
        a.v[e] = work.rank + offset + e < p.in.R ? activate(p.in.activation, a.v[e]) : 0.0f;
      }
    }
    store_16(&s.dh[r * C::kRankStride + offset], narrow<T>(dh));
    store_16(&s.a[r * C::kRankStride + offset], narrow<T>(a));
  }
}

// sums [ranks, columns] += ranksᵀ columns, over the 64 rows of the tiles. The rows are the depth of
// the product, so both fragments are loaded transposed.
template <class C>
__device__ __forceinline__ void accumulate(FragmentD (&sums)[C::kWarpColumns / 8],
                                           const typename C::T* ranks,
                                           const typename C::T* columns) {
  using T = typename C::T;
  const int rank = warp_index() % C::kWarpsOverRanks * 16;  // the warp's part of the tile
  const int column = warp_index() / C::kWarpsOverRanks * C::kWarpColumns;
  for (int k = 0; k < kBlockT; k += 16) {
    const FragmentA a = load_a_transposed(ranks + k * C::kRankStride + rank, C::kRankStride);
    for (int n = 0; n < C::kWarpColumns / 8; n += 2) {
      FragmentB b[2];
      load_b_pair_transposed(b, columns + k * kChunkStride + column + 8 * n, kChunkStride);
      multiply_add<T>(sums[n], a, b[0]);
      multiply_add<T>(sums[n + 1], a, b[1]);
    }
  }
}

// A warp's part of a tile [ranks, 64] of partial sums.
template <class C>
__device__ __forceinline__ void leave_tile(float* partial,
                                           const FragmentD (&sums)[C::kWarpColumns / 8]) {
  const int rank = warp_index() % C::kWarpsOverRanks * 16;  // as in accumulate
  const int column = warp_index() / C::kWarpsOverRanks * C::kWarpColumns;
  for (int n = 0; n < C::kWarpColumns / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      partial[(rank + FragmentD::row(i)) * kChunk + column + 8 * n + FragmentD::column(i)] =
          sums[n].r[i];
    }
  }
}

// Adds the threads' shares of a vector, eight elements to each of kGroups neighbouring threads,
// over the warp; the sums of the block's four warps are added in shared memory later.
template <int kGroups>
__device__ __forceinline__ void leave_vector(float* warp_sums, Float8 values) {
  for (int e = 0; e < 8; ++e) {
    // Lanes with the same eight elements are kGroups apart.
    for (int mask = kGroups; mask < 32; mask *= 2) values.v[e] += shfl_xor(values.v[e], mask);
    if (lane_index() < kGroups) warp_sums[lane_index() * 8 + e] = values.v[e];
  }
}

// Draws a ticket; true for the last block of a tile, to which all partial sums are then visible.
template <class C>
__device__ __forceinline__ bool is_last_split(const BackwardParams& p, Shared<C>& s,
                                              const Work& work) {
  sync_threads();  // the whole block has written its partial sums before they are announced
  if (thread_index() == 0) s.is_last = take_ticket(p.tickets + work.tile) == p.splits - 1;
  sync_threads();  // is_last is there, and with it what the other blocks wrote
  return s.is_last != 0;
}

// Adds the splits in their order and writes the gradients.
template <class C>
__device__ __forceinline__ void write_gradients(const BackwardParams& p, const Work& work) {
  using T = typename C::T;
  const Call& in = p.in;
  // [splits, kPartialFloats]
  const float* partial = p.weight_partial + work.tile * p.splits * C::kPartialFloats;
  auto total = [&](int i) {
    float sum = 0.0f;
#pragma unroll 8  // the loads of a group are under way together; the order of the sum stays
    for (int split = 0; split < p.splits; ++split) {
      sum += partial[static_cast<int64_t>(split) * C::kPartialFloats + i];
    }
    return sum;
  };
  const int64_t R = in.R, D = in.D;
  // The banks may have different sizes; the grid has as many members as the larger one.
  const bool has_down = work.member < in.M, has_up = work.member < in.M_up;
  for (int i = thread_index(); i < C::kTileFloats; i += kThreads) {
    const int64_t r = work.rank + i / kChunk, d = work.column + i % kChunk;
    if (p.in.grad[kWDown] != nullptr && has_down && r < R && d < D) {
      store_grad<T>(p.in.parameter_grad(kWDown), (work.member * R + r) * D + d, total(i));
    }
    // W_up lies as [D, R]: neighbouring threads take neighbouring ranks.
    const int up_r = i % C::kRankBlock, up_d = i / C::kRankBlock;
    if (p.in.grad[kWUp] != nullptr && has_up && work.rank + up_r < R && work.column + up_d < D) {
      store_grad<T>(p.in.parameter_grad(kWUp),
                    (work.member * D + work.column + up_d) * R + work.rank + up_r,
                    total(C::kTileFloats + up_r * kChunk + up_d));
    }
  }
  const int vectors = 2 * C::kTileFloats;  // where the vectors begin
  const int i = thread_index();
  // A vector belongs to the first tile of its row, or column, of tiles.
  if (i < kChunk && work.column + i < D && work.rank == 0) {
    if (p.in.grad[kBUp] != nullptr && has_up) {
      store_grad<T>(p.in.parameter_grad(kBUp), work.member * D + work.column + i,
                    total(vectors + i));
    }
    if (p.in.grad[kGateWeight] != nullptr && work.member == 0) {
      store_grad<T>(p.in.parameter_grad(kGateWeight), work.column + i, total(vectors + kChunk + i));
    }
  }
  if (i < C::kRankBlock && work.rank + i < R && work.column == 0) {
    if (p.in.grad[kBDown] != nullptr && has_down) {
      store_grad<T>(p.in.parameter_grad(kBDown), work.member * R + work.rank + i,
                    total(vectors + 2 * kChunk + i));
    }
  }
}

// The tile's sums over this block's part of the rows.
template <class C>
__device__ __forceinline__ void sum_rows(const BackwardParams& p, Shared<C>& s, const Work& work) {
  const Call& in = p.in;
  FragmentD down[C::kWarpColumns / 8], up[C::kWarpColumns / 8];  // dW_down, dW_up transposed
  VectorSums vectors;
  const int tiles = p.tiling.tiles;
  // The splits differ by one tile at most.
  const int begin = static_cast<int>(static_cast<int64_t>(tiles) * work.split / p.splits);
  const int end = static_cast<int>(static_cast<int64_t>(tiles) * (work.split + 1) / p.splits);
  for (int tile = begin; tile < end; ++tile) {
    const TileRows rows = rows_of_tile<kBlockT>(p.tiling, tile);
    Wanted wanted;
    wanted.down = down_member_of(in, rows) == work.member;
    wanted.up = up_member_of(in, rows) == work.member;
    wanted.gate = has_learned_gate(in) && work.member == 0 && work.rank == 0;
    if (!wanted.down && !wanted.up && !wanted.gate) continue;  // another member's sentence
    bring_columns<C>(p, s, rows, work, wanted, vectors);
    bring_ranks<C>(p, s, rows, work, wanted, vectors);
    sync_threads();  // the four tiles are there
    if (wanted.down) accumulate<C>(down, s.dh, s.x);
    if (wanted.up) accumulate<C>(up, s.a, s.du);
    sync_threads();  // they have been read, the next rows may replace them
  }
  float* partial = p.weight_partial + (work.tile * p.splits + work.split) * C::kPartialFloats;
  // Written also by a split without rows for this member: the sum over splits reads all.
  leave_tile<C>(partial, down);
  leave_tile<C>(partial + C::kTileFloats, up);
  float* warp_sums = s.sums[warp_index()];
  leave_vector<kVectors>(warp_sums, vectors.db_up);
  leave_vector<kVectors>(warp_sums + kChunk, vectors.dw_gate);
  leave_vector<C::kRankVectors>(warp_sums + 2 * kChunk, vectors.db_down);
  sync_threads();  // all four warps' sums are there
  for (int i = thread_index(); i < 2 * kChunk + C::kRankBlock; i += kThreads) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += s.sums[warp][i];
    partial[2 * C::kTileFloats + i] = sum;
  }
}

// Gradients of the norms: the sums that the warps of the first launch left, in their order. Two
// halves of the block take every second one.
template <class C>
__device__ __forceinline__ void reduce_norms(const BackwardParams& p, Shared<C>& s, int column) {
  using T = typename C::T;
  const ParameterGrad grads[2][2] = {
      {p.in.parameter_grad(kPreNormWeight), p.in.parameter_grad(kPreNormBias)},
      {p.in.parameter_grad(kPostNormWeight), p.in.parameter_grad(kPostNormBias)}};
  const bool is_there[2] = {has_pre_norm(p.in), has_post_norm(p.in)};
  const int norms = norms_of(p.in);
  const int warps = p.tiling.tiles * kWarps;  // that have left sums
  const int64_t D = p.in.D, d = column + thread_index() % kChunk;
  const int half = thread_index() / kChunk;  // of the block: 64 columns, every second warp's sums
  int norm = 0;  // among those that are there, as the first launch counted them
  for (int which = 0; which < 2; ++which) {
    if (!is_there[which]) continue;
    for (int vector = 0; vector < 2; ++vector) {
      float sum = 0.0f;
      for (int warp = half; warp < warps && d < D; warp += 2) {
        sum += p.norm_partial[((static_cast<int64_t>(warp) * norms + norm) * 2 + vector) * D + d];
      }
      s.sums[half][thread_index() % kChunk] = sum;
      sync_threads();  // both halves are there
      if (half == 0 && d < D && grads[which][vector].data != nullptr) {
        store_grad<T>(grads[which][vector], d,
                      s.sums[0][thread_index()] + s.sums[1][thread_index()]);
      }
      sync_threads();  // they have been read, the next vector may replace them
    }
    ++norm;
  }
}

// A value of each row, summed over all rows by the whole block.
template <class C, class ValueOfRow>
__device__ __forceinline__ float block_sum(Shared<C>& s, int64_t rows, ValueOfRow&& value) {
  float sum = 0.0f;
  // Always by one block of kThreads: the order of the sum depends on nothing.
  for (int64_t row = thread_index(); row < rows; row += kThreads) sum += value(row);
  sum = warp_sum(sum);
  if (lane_index() == 0) s.scalar[warp_index()] = sum;
  sync_threads();  // all four warps' sums are there
  const float total = s.scalar[0] + s.scalar[1] + s.scalar[2] + s.scalar[3];
  sync_threads();  // they have been read, another sum may replace them
  return total;
}

// Gradients of scale, of the gate's bias and of a given gate: sums of the rows' dots and dlogits.
template <class C>
__device__ __forceinline__ void reduce_scalars(const BackwardParams& p, Shared<C>& s) {
  using T = typename C::T;
  const Call& in = p.in;
  const int64_t rows = rows_of(in);
  const int block = block_index_x(), blocks = grid_blocks_x();
  // y changes by dot times gate with scale, by dot times scale with the gate.
  if (block == 0 && p.in.grad[kScale] != nullptr) {
    const float sum = block_sum<C>(s, rows, [&](int64_t row) {
      return read_scalar(p, kDot, row) * gate_of_row<T>(in, p.in.output_as<float>(kGateValue), row);
    });
    if (thread_index() == 0) store_grad<T>(p.in.parameter_grad(kScale), 0, in.scale_value * sum);
  }
  if (block == 0 && p.in.grad[kGateBias] != nullptr) {
    const float sum =
        block_sum<C>(s, rows, [&](int64_t row) { return read_scalar(p, kDLogit, row); });
    if (thread_index() == 0) store_grad<T>(p.in.parameter_grad(kGateBias), 0, sum);
  }
  if (p.in.grad[kGate] == nullptr) return;
  const float scale = scale_of<T>(in);
  if (has_gate_per_row(in)) {  // nothing to add: the blocks share the rows
    const int64_t step = static_cast<int64_t>(blocks) * kThreads;
    for (int64_t row = block * kThreads + thread_index(); row < rows; row += step) {
      store_grad<T>(p.in.parameter_grad(kGate), row, scale * read_scalar(p, kDot, row));
    }
    return;
  }
  // A warp for each sentence.
  for (int b = block * kWarps + warp_index(); b < in.B; b += blocks * kWarps) {
    float sum = 0.0f;
    for (int t = lane_index(); t < in.S; t += 32) {
      sum += read_scalar(p, kDot, static_cast<int64_t>(b) * in.S + t);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) store_grad<T>(p.in.parameter_grad(kGate), b, scale * sum);
  }
}

// Grid: column tiles; rank tiles by splits; members, and one more layer for the norms and scalars.
template <class C>
__global__ void __launch_bounds__(kThreads)
    gated_adapter_bwd_weights_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  // Blocks of one split are neighbours: they read the same rows at about the same time.
  const int rank_tiles = grid_blocks_y() / p.splits;
  const int rank_tile = block_index_y() % rank_tiles;
  Work work;
  work.column = block_index_x() * kChunk;
  work.rank = rank_tile * C::kRankBlock;
  work.member = block_index_z();
  work.split = block_index_y() / rank_tiles;
  work.tile = (static_cast<int64_t>(work.member) * grid_blocks_x() + block_index_x()) * rank_tiles +
              rank_tile;
  if (work.member == grid_blocks_z() - 1) {
    if (block_index_y() == 0) {  // there are no ranks here
      reduce_norms<C>(p, s, work.column);
      reduce_scalars<C>(p, s);
    }
  } else {
    // Nobody waits: whoever comes last to a tile does the rest.
    sum_rows<C>(p, s, work);
    if (is_last_split<C>(p, s, work)) write_gradients<C>(p, work);
  }
}

using Configs = WeightConfigsOf<Config>;

}  // namespace

void launch_bwd_weights_sm80(const BackwardParams& p) {
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && C::kRankBlock == weight_ranks(p.in.R);
      },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        const LaunchShape shape{p.column_tiles, p.rank_tiles * p.splits, p.members + 1, kThreads,
                                sizeof(Shared<C>)};
        launch<gated_adapter_bwd_weights_sm80<C>>("gated_adapter_bwd_weights_sm80", shape,
                                                  p.in.stream, p);
      });
  check(found, "gated_adapter_bwd_weights_sm80: expected a call that why_not serves, got ",
        name_of(p.in.dtype));
}

}  // namespace pelt::gated_adapter
