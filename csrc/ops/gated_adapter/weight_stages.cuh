// The rows that a block of bwd_weights has in shared memory: what of them it wants, the stages of its
// ring, how they are brought in, and what becomes of them before they are multiplied.
//
// A thread brings vectors of 16 bytes by cp.async, always the same columns and ranks of every
// sixteenth row. After it has waited for its own vectors, and before the block's barrier, it applies
// dropout and the pre-norm to them where there are any: no other thread has seen them yet.
#pragma once

#include "ops/gated_adapter/configs.h"
#include "ops/gated_adapter/parts.cuh"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {
namespace {

constexpr int kStages = 3;  // of the ring: one in use, two on the way
constexpr int kTurns = 4;   // a thread has its vector of every sixteenth row of a stage

static_assert(kThreads / kVectors * kTurns == kWeightRows, "a stage is brought in kTurns turns");
static_assert(kThreads == 2 * kWeightRows, "a thread brings the parts of one number");
static_assert(kPartsStride == kTilePad, "the parts lie in the place of the padding");

template <class T_, int kRankBlock_, bool kIsPlain_>
struct Config {
  using T = T_;
  static constexpr int kRankBlock = kRankBlock_;
  // Neither dropout nor a pre-norm: x and dy are multiplied as they lie in memory.
  static constexpr bool kIsPlain = kIsPlain_;
  static constexpr int kRankStride = kRankBlock + kTilePad;  // elements from row to row of dh and a
  static constexpr int kRankVectors = kRankBlock / 8;        // of 16 bytes in a row
  // Threads over a row of dh or a: a power of two, of which some may have no vector.
  static constexpr int kRankLanes = kRankBlock == 16 ? 2 : 8;
  static constexpr int kRankTurns = kWeightRows * kRankLanes / kThreads;
  static constexpr int kRankTiles = kRankBlock / 8;  // of 8 ranks, as mma_m16n8k16 has them
  static constexpr int kTileFloats = kRankBlock * kChunk;
  static constexpr int kPartialFloats = partial_floats(kRankBlock);
  // Blocks that share a multiprocessor's registers; more would not find the shared memory.
  static constexpr int kMinBlocks = 2;
  static_assert(kRankBlock % 16 == 0 && kRankVectors <= kRankLanes, "a row's vectors have threads");
  static_assert(kPartialFloats % 4 == 0, "partial sums are moved 16 bytes at a time");
};

// Which weight, by which a warp finds its operands in a stage.
enum Weight { kDown, kUp };

template <class C>
struct Stage {
  using T = typename C::T;
  alignas(16) T columns[2][kWeightRows * kChunkStride];  // x and dy, [rows, columns]
  // dh and a, [rows, ranks], and in the place of the padding the parts of dlogit and of the factor.
  alignas(16) T ranks[2][kWeightRows * C::kRankStride];
};

// The tile of the gradients and the part of the rows that a block works on.
struct Work {
  int column;  // the first one
  int rank;
  int member;
  int split;
  int64_t tile;  // its number among all tiles of the gradients
};

// What a block sums, as bits. A vector belongs to the first tile of its row, or column, of tiles.
enum Sum : int {
  kDownTile = 1,
  kUpTile = 2,
  kDownBias = 4,
  kUpBias = 8,
  kGateRow = 16,  // dw_gate: of the rows of all members
  kDownSums = kDownTile | kDownBias,
  kUpSums = kUpTile | kUpBias
};

__device__ __forceinline__ int wanted_of(const BackwardParams& p, const Work& work) {
  const Call& in = p.in;
  int wanted = 0;
  if (in.grad[kWDown] != nullptr) wanted |= kDownTile;
  if (in.grad[kWUp] != nullptr) wanted |= kUpTile;
  if (in.grad[kBDown] != nullptr && work.column == 0) wanted |= kDownBias;
  if (in.grad[kBUp] != nullptr && work.rank == 0) wanted |= kUpBias;
  if (in.grad[kGateWeight] != nullptr && work.member == 0 && work.rank == 0) wanted |= kGateRow;
  return wanted;
}

// What the block's member has of all rows, where there is no index for each sample.
__device__ __forceinline__ int wanted_of_all(const Call& in, const Work& work, int wanted) {
  const int64_t down = member_of(in.input_as<int64_t>(kDownIndex), /*is_per_sample=*/false,
                                 /*group=*/0, in.M);
  const int64_t up = member_of(in.input_as<int64_t>(kUpIndex), /*is_per_sample=*/false,
                               /*group=*/0, in.M_up);
  return wanted &
         (kGateRow | (down == work.member ? kDownSums : 0) | (up == work.member ? kUpSums : 0));
}

// Rows on their way through the ring.
struct Step {
  int tile;       // of weight_tiling; the split's end: nothing is left
  int sums;       // those of the block that the rows have part in
  int64_t first;  // row
  int count;
};

// The first tile from `tile` on with something that is wanted. Of all rows the block's member has
// `of_all`, or else what the index of each sample says.
__device__ __forceinline__ Step find_step(const BackwardParams& p, const Work& work, int wanted,
                                          int of_all, int tile, int end) {
  Step step = {tile, 0, 0, 0};
  if (!has_weights_per_sample(p.in)) {
    if (of_all == 0) step.tile = end;
    step.sums = of_all;
    step.first = static_cast<int64_t>(tile) * kWeightRows;
    const int64_t left = rows_of(p.in) - step.first;
    step.count = left < kWeightRows ? static_cast<int>(left) : kWeightRows;
    return step;
  }
  for (; step.tile < end; ++step.tile) {
    const TileRows rows = rows_of_tile<kWeightRows>(p.weight_tiling, step.tile);
    step.sums = wanted & kGateRow;
    if (down_member_of(p.in, rows) == work.member) step.sums |= wanted & kDownSums;
    if (up_member_of(p.in, rows) == work.member) step.sums |= wanted & kUpSums;
    step.first = rows.first;
    step.count = rows.count;
    if (step.sums != 0) break;
  }
  return step;
}

// A thread's vectors of 16 bytes: eight columns of rows thread / 8 + 16 turn of x and of dy, eight
// ranks of dh and of a likewise. Where the first of them lies in memory if the stage begins at row
// 0, and in a stage.
template <class C>
struct Places {
  using T = typename C::T;
  const T* x;
  const T* dy;  // or du
  const T* dh;
  const T* a;
  const T* parts;  // of dlogit for the first threads, of the factor for the others
  int column;      // the first of the eight
  int64_t norm;    // where the parameters of the member's pre-norm begin for them
  int column_row;
  int column_at;  // in elements
  int rank_row;
  int rank_at;
  int parts_row;
  bool has_columns;  // below D
  bool has_ranks;    // below R
  bool fills_ranks;  // there is a place in the stage at all
};

template <class C>
__device__ __forceinline__ Places<C> places_of(const BackwardParams& p, const Work& work) {
  using T = typename C::T;
  const Call& in = p.in;
  Places<C> to;
  const int offset = thread_index() % kVectors * 8;
  to.column = work.column + offset;
  to.norm = pre_norm_at(in, work.member) + to.column;
  to.column_row = thread_index() / kVectors;
  to.column_at = to.column_row * kChunkStride + offset;
  to.has_columns = to.column < in.D;
  const int64_t first_column = static_cast<int64_t>(to.column_row) * in.D + to.column;
  to.x = in.input_as<T>(kX) + first_column;
  to.dy = static_cast<const T*>(has_post_norm(in) ? p.du : in.doutput[kY]) + first_column;

  const int lane = thread_index() % C::kRankLanes, rank = work.rank + lane * 8;
  to.rank_row = thread_index() / C::kRankLanes;
  to.rank_at = to.rank_row * C::kRankStride + lane * 8;
  to.fills_ranks = lane < C::kRankVectors;
  to.has_ranks = rank < p.rank_stride;
  const int64_t first_rank = static_cast<int64_t>(to.rank_row) * p.rank_stride + rank;
  to.dh = static_cast<const T*>(p.dh) + first_rank;
  to.a = static_cast<const T*>(p.a) + first_rank;
  to.parts_row = thread_index() % kWeightRows;
  const void* parts = thread_index() < kWeightRows ? p.dlogit_parts : p.factor_parts;
  to.parts = static_cast<const T*>(parts) + to.parts_row * kPartsStride;
  return to;
}

// Asks for the thread's vectors of a step; rows, columns and ranks that do not exist become zeros.
// Where all of them do (kIsWhole), which is nearly always, no bounds are looked at.
template <class C, bool kIsWhole>
__device__ __forceinline__ void bring(const BackwardParams& p, Stage<C>& stage,
                                      const Places<C>& from, const Step& step) {
  using T = typename C::T;
  auto bring_columns = [&](T* to, const T* memory) {
    constexpr int kRows = kThreads / kVectors;  // of a turn
    memory += step.first * p.in.D;
    to += from.column_at;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const bool is_there = from.has_columns && from.column_row + turn * kRows < step.count;
      cp_async_16(to + turn * kRows * kChunkStride, memory, kIsWhole || is_there);
      memory += kRows * static_cast<int64_t>(p.in.D);
    }
  };
  auto bring_ranks = [&](T* to, const T* memory) {
    constexpr int kRows = kThreads / C::kRankLanes;
    if (C::kRankVectors < C::kRankLanes && !from.fills_ranks) return;
    memory += step.first * p.rank_stride;
    to += from.rank_at;
#pragma unroll
    for (int turn = 0; turn < C::kRankTurns; ++turn) {
      const bool is_there = from.has_ranks && from.rank_row + turn * kRows < step.count;
      cp_async_16(to + turn * kRows * C::kRankStride, memory, kIsWhole || is_there);
      memory += kRows * static_cast<int64_t>(p.rank_stride);
    }
  };
  // What a member has no part in is not brought: a NaN there stays there.
  if (step.sums & (kDownTile | kGateRow)) bring_columns(stage.columns[kDown], from.x);
  if (step.sums & kUpSums) bring_columns(stage.columns[kUp], from.dy);
  if (step.sums & kDownSums) bring_ranks(stage.ranks[kDown], from.dh);
  if (step.sums & kUpTile) bring_ranks(stage.ranks[kUp], from.a);
  if (step.sums & (kGateRow | kUpBias)) {  // behind the ranks; the half that nobody asked for is 0
    const bool is_up = thread_index() >= kWeightRows;
    const bool is_asked = (step.sums & (is_up ? kUpBias : kGateRow)) != 0;
    cp_async_16(stage.ranks[is_up ? kUp : kDown] + from.parts_row * C::kRankStride + C::kRankBlock,
                is_asked ? from.parts + step.first * kPartsStride : from.parts,
                is_asked && (kIsWhole || from.parts_row < step.count));
  }
}

// Shares of the vectors' sums that threads have: of eight columns, eight ranks.
struct VectorSums {
  Float8 dw_gate = {};
  Float8 db_down = {};
};

// visit(row of the step, vector) for the thread's vectors of x or of dy, which are changed in place.
// The thread has brought them itself, and waited for them.
template <class T, class Visit>
__device__ __forceinline__ void change_vectors(T* columns, int row, int at, Visit&& visit) {
  for (int turn = 0; turn < kTurns; ++turn) {
    constexpr int kRows = kThreads / kVectors;  // of a turn
    T* place = columns + at + turn * kRows * kChunkStride;
    Float8 values = widen<T>(load_16(place));
    visit(row + turn * kRows, values);
    store_16(place, narrow<T>(values));
  }
}

// The pre-norm of x. The gate sees x before it, so that dw_gate is summed here, and not by the
// product.
template <class C>
__device__ __forceinline__ void settle_x(const BackwardParams& p, Stage<C>& stage,
                                         const Places<C>& at, const Step& step, VectorSums& sums) {
  using T = typename C::T;
  const Call& in = p.in;
  const bool norms = has_pre_norm(in) && (step.sums & kDownTile);
  if (!norms && !(step.sums & kGateRow)) return;
  Float8 weight = {}, bias = {};
  if (norms && at.has_columns) {
    weight = load_parameter_8<T>(in.parameter(kPreNormWeight), at.norm);
    bias = load_parameter_8<T>(in.parameter(kPreNormBias), at.norm);
  }
  change_vectors(stage.columns[kDown], at.column_row, at.column_at, [&](int r, Float8& x) {
    if (r >= step.count) return;  // rows that are not there are zeros and stay so
    const int64_t row = step.first + r;
    if (step.sums & kGateRow) {
      const float dlogit = *row_scalar(p, kDLogit, row);
      for (int e = 0; e < 8; ++e) sums.dw_gate.v[e] += dlogit * x.v[e];
    }
    if (norms) {  // normed again, as the down projection took it
      const float mean = *row_scalar(p, kMean, row), rstd = *row_scalar(p, kRstd, row);
      for (int e = 0; e < 8; ++e) x.v[e] = (x.v[e] - mean) * rstd * weight.v[e] + bias.v[e];
    }
  });
}

// The dropout of dy; du has passed through it.
template <class C>
__device__ __forceinline__ void settle_dy(const BackwardParams& p, Stage<C>& stage,
                                          const Places<C>& at, const Step& step) {
  const Call& in = p.in;
  if (!in.dropout.is_active() || has_post_norm(in) || !(step.sums & kUpSums)) return;
  change_vectors(stage.columns[kUp], at.column_row, at.column_at, [&](int row, Float8& dy) {
    if (row >= step.count || !at.has_columns) return;
    const Float8 factors = dropout_of_row(in, step.first + row, at.column);
    for (int e = 0; e < 8; ++e) dy.v[e] *= factors.v[e];
  });
}

// dh's part of db_down.
template <class C>
__device__ __forceinline__ void settle_dh(const Stage<C>& stage, const Places<C>& at,
                                          const Step& step, VectorSums& sums) {
  using T = typename C::T;
  if (!(step.sums & kDownBias) || !at.fills_ranks) return;
#pragma unroll
  for (int turn = 0; turn < C::kRankTurns; ++turn) {
    const int place = at.rank_at + turn * (kThreads / C::kRankLanes) * C::kRankStride;
    const Float8 dh = widen<T>(load_16(stage.ranks[kDown] + place));
    for (int e = 0; e < 8; ++e) sums.db_down.v[e] += dh.v[e];
  }
}

}  // namespace
}  // namespace pelt::gated_adapter
