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
#include "common/type_list.h"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {
namespace {

template <class T_, int kRankBlock_>
struct Config {
  using T = T_;
  static constexpr int kRankBlock = kRankBlock_;
  static constexpr int kRankStride = kRankBlock + kTilePad;
  static constexpr int kRankVectors = kRankBlock / 8;
  static constexpr int kWarpsOverRanks = kRankBlock / 16;
  static constexpr int kWarpColumns = kChunk / (kWarps / kWarpsOverRanks);
  // Floats that a block leaves: two tiles, then db_up, dw_gate [64] and db_down [ranks].
  static constexpr int kTileFloats = kRankBlock * kChunk;
  static constexpr int kPartialFloats = 2 * kTileFloats + 2 * kChunk + kRankBlock;
  static_assert(kWarps % kWarpsOverRanks == 0, "the warps divide the tile evenly");
  static_assert(kWarpColumns % 16 == 0, "fragments of B come in pairs of 8 columns");
};

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(16) T x[kBlockT * kChunkStride];     // pre_norm(x), [rows, columns]
  alignas(16) T du[kBlockT * kChunkStride];    // [rows, columns]
  alignas(16) T dh[kBlockT * C::kRankStride];  // [rows, ranks]
  alignas(16) T a[kBlockT * C::kRankStride];   // phi(h), [rows, ranks]
  float sums[kWarps][2 * kChunk + C::kRankBlock];
  float scalar[kWarps];
  int is_last;
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

template <class T>
__device__ __forceinline__ void store_grad(const ParameterGrad& grad, int64_t i, float value) {
  if (grad.is_float32) {
    static_cast<float*>(grad.data)[i] = value;
  } else {
    static_cast<T*>(grad.data)[i] = round_to<T>(value);
  }
}

__device__ __forceinline__ float read_scalar(const BackwardParams& p, RowScalar which,
                                             int64_t row) {
  return p.row_scalars[static_cast<int64_t>(which) * p.in.B * p.in.S + row];
}

// x and du, [64, 64] from column `work.column` on; absent rows and columns are zero.
template <class C>
__device__ __forceinline__ void bring_columns(const BackwardParams& p, Shared<C>& s,
                                              const TileRows& rows, const Work& work,
                                              const Wanted& wanted, VectorSums& sums) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int column = work.column + thread_index() % kVectors * 8;
  for (int r = thread_index() / kVectors; r < kBlockT; r += kThreads / kVectors) {
    Float8 x = {}, du = {};
    const int64_t row = rows.first + r, at = row * in.D + column;
    const bool is_there = r < rows.count && column < in.D;
    if (is_there && (wanted.down || wanted.gate)) x = load_8(static_cast<const T*>(in.x) + at);
    if (is_there && wanted.gate) {
      const float dlogit = read_scalar(p, kLogit, row);
      for (int e = 0; e < 8; ++e) sums.dw_gate.v[e] += dlogit * x.v[e];
    }
    if (is_there && wanted.down && in.has_pre_norm()) {
      const float mean = read_scalar(p, kMean, row), rstd = read_scalar(p, kRstd, row);
      const Float8 weight = load_parameter_8<T>(in.pre_norm_weight, column);
      const Float8 bias = load_parameter_8<T>(in.pre_norm_bias, column);
      for (int e = 0; e < 8; ++e) x.v[e] = (x.v[e] - mean) * rstd * weight.v[e] + bias.v[e];
    }
    if (is_there && wanted.up) {
      du = load_8(static_cast<const T*>(in.has_post_norm() ? p.du : p.dy) + at);
      const bool drops = in.dropout.is_active() && !in.has_post_norm();
      const Float8 factors = drops ? dropout_of(in, row, column) : Float8{};
      const float factor = read_scalar(p, kFactor, row);
      for (int e = 0; e < 8; ++e) {
        du.v[e] *= drops ? factor * factors.v[e] : factor;
        sums.db_up.v[e] += du.v[e];
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
  if (R % 8 == 0) {
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
  const int offset = thread_index() % C::kRankVectors * 8;
  for (int r = thread_index() / C::kRankVectors; r < kBlockT; r += kThreads / C::kRankVectors) {
    Float8 dh = {}, a = {};
    if (r < rows.count && wanted.down) {
      dh = load_ranks<T>(p.dh, p.in.R, rows.first + r, work.rank + offset);
      for (int e = 0; e < 8; ++e) sums.db_down.v[e] += dh.v[e];
    }
    if (r < rows.count && wanted.up) {
      a = load_ranks<T>(p.h, p.in.R, rows.first + r, work.rank + offset);
      for (int e = 0; e < 8; ++e) {
        a.v[e] = work.rank + offset + e < p.in.R ? activate(p.in.activation, a.v[e]) : 0.0f;
      }
    }
    store_16(&s.dh[r * C::kRankStride + offset], narrow<T>(dh));
    store_16(&s.a[r * C::kRankStride + offset], narrow<T>(a));
  }
}

// sums [ranks, columns] += ranksᵀ columns, over the 64 rows of the tiles.
template <class C>
__device__ __forceinline__ void accumulate(FragmentD (&sums)[C::kWarpColumns / 8],
                                           const typename C::T* ranks,
                                           const typename C::T* columns) {
  using T = typename C::T;
  const int rank = warp_index() % C::kWarpsOverRanks * 16;
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
  const int rank = warp_index() % C::kWarpsOverRanks * 16;
  const int column = warp_index() / C::kWarpsOverRanks * C::kWarpColumns;
  for (int n = 0; n < C::kWarpColumns / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      partial[(rank + FragmentD::row(i)) * kChunk + column + 8 * n + FragmentD::column(i)] =
          sums[n].r[i];
    }
  }
}

// Adds the threads' shares of a vector, eight elements to each of kGroups neighbouring threads,
// over the warp; the block's four sums meet in shared memory.
template <int kGroups>
__device__ __forceinline__ void leave_vector(float* warp_sums, Float8 values) {
  for (int e = 0; e < 8; ++e) {
    for (int mask = kGroups; mask < 32; mask *= 2) values.v[e] += shfl_xor(values.v[e], mask);
    if (lane_index() < kGroups) warp_sums[lane_index() * 8 + e] = values.v[e];
  }
}

// Draws a ticket; true for the last block of a tile, to which all partial sums are then visible.
template <class C>
__device__ __forceinline__ bool is_last_split(const BackwardParams& p, Shared<C>& s,
                                              const Work& work) {
  sync_threads();
  if (thread_index() == 0) s.is_last = take_ticket(p.tickets + work.tile) == p.splits - 1;
  sync_threads();
  return s.is_last != 0;
}

// Adds the splits in their order and writes the gradients.
template <class C>
__device__ __forceinline__ void write_gradients(const BackwardParams& p, const Work& work) {
  using T = typename C::T;
  const Inputs& in = p.in;
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
  const bool has_down = work.member < in.down_members, has_up = work.member < in.up_members;
  for (int i = thread_index(); i < C::kTileFloats; i += kThreads) {
    const int64_t r = work.rank + i / kChunk, d = work.column + i % kChunk;
    if (p.dw_down.data != nullptr && has_down && r < R && d < D) {
      store_grad<T>(p.dw_down, (work.member * R + r) * D + d, total(i));
    }
    // W_up lies as [D, R]: neighbouring threads take neighbouring ranks.
    const int up_r = i % C::kRankBlock, up_d = i / C::kRankBlock;
    if (p.dw_up.data != nullptr && has_up && work.rank + up_r < R && work.column + up_d < D) {
      store_grad<T>(p.dw_up, (work.member * D + work.column + up_d) * R + work.rank + up_r,
                    total(C::kTileFloats + up_r * kChunk + up_d));
    }
  }
  const int vectors = 2 * C::kTileFloats;
  const int i = thread_index();
  if (i < kChunk && work.column + i < D && work.rank == 0) {
    if (p.db_up.data != nullptr && has_up) {
      store_grad<T>(p.db_up, work.member * D + work.column + i, total(vectors + i));
    }
    if (p.dgate_weight.data != nullptr && work.member == 0) {
      store_grad<T>(p.dgate_weight, work.column + i, total(vectors + kChunk + i));
    }
  }
  if (i < C::kRankBlock && work.rank + i < R && work.column == 0) {
    if (p.db_down.data != nullptr && has_down) {
      store_grad<T>(p.db_down, work.member * R + work.rank + i, total(vectors + 2 * kChunk + i));
    }
  }
}

// The tile's sums over this block's part of the rows.
template <class C>
__device__ __forceinline__ void sum_rows(const BackwardParams& p, Shared<C>& s, const Work& work) {
  const Inputs& in = p.in;
  FragmentD down[C::kWarpColumns / 8], up[C::kWarpColumns / 8];
  VectorSums vectors;
  const int tiles = p.tiling.tiles;
  const int begin = static_cast<int>(static_cast<int64_t>(tiles) * work.split / p.splits);
  const int end = static_cast<int>(static_cast<int64_t>(tiles) * (work.split + 1) / p.splits);
  for (int tile = begin; tile < end; ++tile) {
    const TileRows rows = rows_of_tile(p.tiling, tile);
    Wanted wanted;
    wanted.down = member_of(in.down_index, in.has_down_index_per_sample, rows.group,
                            in.down_members) == work.member;
    wanted.up = member_of(in.up_index, in.has_up_index_per_sample, rows.group, in.up_members) ==
                work.member;
    wanted.gate = in.has_learned_gate() && work.member == 0 && work.rank == 0;
    if (!wanted.down && !wanted.up && !wanted.gate) continue;
    bring_columns<C>(p, s, rows, work, wanted, vectors);
    bring_ranks<C>(p, s, rows, work, wanted, vectors);
    sync_threads();
    if (wanted.down) accumulate<C>(down, s.dh, s.x);
    if (wanted.up) accumulate<C>(up, s.a, s.du);
    sync_threads();
  }
  float* partial = p.weight_partial + (work.tile * p.splits + work.split) * C::kPartialFloats;
  leave_tile<C>(partial, down);
  leave_tile<C>(partial + C::kTileFloats, up);
  float* warp_sums = s.sums[warp_index()];
  leave_vector<kVectors>(warp_sums, vectors.db_up);
  leave_vector<kVectors>(warp_sums + kChunk, vectors.dw_gate);
  leave_vector<C::kRankVectors>(warp_sums + 2 * kChunk, vectors.db_down);
  sync_threads();
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
  const ParameterGrad grads[2][2] = {{p.dpre_norm_weight, p.dpre_norm_bias},
                                     {p.dpost_norm_weight, p.dpost_norm_bias}};
  const bool is_there[2] = {p.in.has_pre_norm(), p.in.has_post_norm()};
  const int norms = (is_there[0] ? 1 : 0) + (is_there[1] ? 1 : 0);
  const int slots = p.tiling.tiles * kWarps;
  const int64_t D = p.in.D, d = column + thread_index() % kChunk;
  const int half = thread_index() / kChunk;
  int norm = 0;
  for (int which = 0; which < 2; ++which) {
    if (!is_there[which]) continue;
    for (int vector = 0; vector < 2; ++vector) {
      float sum = 0.0f;
      for (int slot = half; slot < slots && d < D; slot += 2) {
        sum += p.norm_partial[((static_cast<int64_t>(slot) * norms + norm) * 2 + vector) * D + d];
      }
      s.sums[half][thread_index() % kChunk] = sum;
      sync_threads();
      if (half == 0 && d < D && grads[which][vector].data != nullptr) {
        store_grad<T>(grads[which][vector], d,
                      s.sums[0][thread_index()] + s.sums[1][thread_index()]);
      }
      sync_threads();
    }
    ++norm;
  }
}

// A value of each row, summed over all rows by the whole block.
template <class C, class ValueOfRow>
__device__ __forceinline__ float block_sum(Shared<C>& s, int64_t rows, ValueOfRow&& value) {
  float sum = 0.0f;
  for (int64_t row = thread_index(); row < rows; row += kThreads) sum += value(row);
  sum = warp_sum(sum);
  if (lane_index() == 0) s.scalar[warp_index()] = sum;
  sync_threads();
  const float total = s.scalar[0] + s.scalar[1] + s.scalar[2] + s.scalar[3];
  sync_threads();
  return total;
}

// Gradients of scale, of the gate's bias and of a given gate: sums of the rows' dots and logits.
template <class C>
__device__ __forceinline__ void reduce_scalars(const BackwardParams& p, Shared<C>& s) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int64_t rows = static_cast<int64_t>(in.B) * in.S;
  const int block = block_index_x(), blocks = grid_blocks_x();
  if (block == 0 && p.dscale.data != nullptr) {
    const float sum = block_sum<C>(s, rows, [&](int64_t row) {
      return read_scalar(p, kDot, row) * gate_of_row<T>(in, p.gate_value, row);
    });
    if (thread_index() == 0) store_grad<T>(p.dscale, 0, in.scale_value * sum);
  }
  if (block == 0 && p.dgate_bias.data != nullptr) {
    const float sum =
        block_sum<C>(s, rows, [&](int64_t row) { return read_scalar(p, kLogit, row); });
    if (thread_index() == 0) store_grad<T>(p.dgate_bias, 0, sum);
  }
  if (p.dgate.data == nullptr) return;
  const float scale = scale_of<T>(in);
  if (in.has_gate_per_row) {
    const int64_t step = static_cast<int64_t>(blocks) * kThreads;
    for (int64_t row = block * kThreads + thread_index(); row < rows; row += step) {
      store_grad<T>(p.dgate, row, scale * read_scalar(p, kDot, row));
    }
    return;
  }
  for (int b = block * kWarps + warp_index(); b < in.B; b += blocks * kWarps) {
    float sum = 0.0f;
    for (int t = lane_index(); t < in.S; t += 32) {
      sum += read_scalar(p, kDot, static_cast<int64_t>(b) * in.S + t);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) store_grad<T>(p.dgate, b, scale * sum);
  }
}

// Grid: column tiles; rank tiles by splits; members, and one more for what is left.
template <class C>
__global__ void __launch_bounds__(kThreads)
    gated_adapter_bwd_weights_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
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
    if (block_index_y() == 0) {
      reduce_norms<C>(p, s, work.column);
      reduce_scalars<C>(p, s);
    }
  } else {
    sum_rows<C>(p, s, work);
    if (is_last_split<C>(p, s, work)) write_gradients<C>(p, work);
  }
}

constexpr int kNarrow = 16, kWide = 64;
using Configs =
    TypeList<Config<bf16, kNarrow>, Config<bf16, kWide>, Config<f16, kNarrow>, Config<f16, kWide>>;

}  // namespace

BackwardPlan plan_backward(const Inputs& in) {
  BackwardPlan plan;
  plan.tiling = make_tiling(in);
  const int64_t rows = static_cast<int64_t>(in.B) * in.S;
  const int rank_block = in.R <= kNarrow ? kNarrow : kWide;
  plan.members = in.down_members > in.up_members ? in.down_members : in.up_members;
  plan.column_tiles = (in.D + kChunk - 1) / kChunk;
  plan.rank_tiles = (in.R + rank_block - 1) / rank_block;
  // Two blocks for each multiprocessor: more splits would mean more partial sums to write and to
  // add.
  const int wanted = 2 * multiprocessors() / (plan.column_tiles * plan.rank_tiles * plan.members);
  plan.splits = wanted < 1 ? 1 : wanted > plan.tiling.tiles ? plan.tiling.tiles : wanted;

  const int64_t weight_tiles =
      static_cast<int64_t>(plan.members) * plan.column_tiles * plan.rank_tiles;
  const int norms = (in.has_pre_norm() ? 1 : 0) + (in.has_post_norm() ? 1 : 0);
  const int64_t partial_floats = 2 * rank_block * kChunk + 2 * kChunk + rank_block;
  auto reserve = [&](int64_t bytes) {
    const int64_t start = plan.total_bytes;
    plan.total_bytes += (bytes + 15) / 16 * 16;
    return start;
  };
  plan.zeroed_bytes = static_cast<int64_t>(sizeof(int)) * (in.B + weight_tiles);
  plan.arrivals = reserve(plan.zeroed_bytes);
  plan.gate_partial = reserve(2 * sizeof(float) * static_cast<int64_t>(plan.tiling.tiles));
  plan.row_scalars = reserve(kRowScalars * sizeof(float) * rows);
  plan.norm_partial =
      reserve(2 * norms * sizeof(float) * in.D * static_cast<int64_t>(plan.tiling.tiles) * kWarps);
  plan.weight_partial = reserve(weight_tiles * plan.splits * partial_floats * sizeof(float));
  plan.dh = reserve(2 * rows * in.R);
  plan.du = reserve(in.has_post_norm() ? 2 * rows * in.D : 0);
  return plan;
}

void launch_gated_adapter_bwd_weights_sm80(const BackwardParams& p, const BackwardPlan& plan,
                                           Stream stream) {
  const ParameterGrad* grads[] = {
      &p.dw_down,        &p.db_down,           &p.dw_up,           &p.db_up,  &p.dpre_norm_weight,
      &p.dpre_norm_bias, &p.dpost_norm_weight, &p.dpost_norm_bias, &p.dscale, &p.dgate,
      &p.dgate_weight,   &p.dgate_bias};
  bool is_wanted = false;
  for (const ParameterGrad* grad : grads) is_wanted |= grad->data != nullptr;
  if (!is_wanted) return;  // a frozen adapter: dx was all
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype &&
               (p.in.R <= C::kRankBlock || C::kRankBlock == kWide);
      },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        LaunchShape shape;
        shape.blocks_x = plan.column_tiles;
        shape.blocks_y = plan.rank_tiles * plan.splits;
        shape.blocks_z = plan.members + 1;
        shape.threads = kThreads;
        shape.shared_bytes = sizeof(Shared<C>);
        launch<gated_adapter_bwd_weights_sm80<C>>("gated_adapter_bwd_weights_sm80", shape, stream,
                                                  p);
      });
  check(found, "gated_adapter_bwd_weights_sm80: expected bfloat16 or float16, got ",
        name_of(p.in.dtype));
}

}  // namespace pelt::gated_adapter
