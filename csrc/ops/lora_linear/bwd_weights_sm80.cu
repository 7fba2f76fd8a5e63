// lora_linear, backward: the sums over rows.
//
//   dA_i = ds_i^T dropout(x)   [R_i, Din]        dw = dlogit^T x   [Din],   db = sum of dlogit
//   dB_i^T = (scale g s_i)^T dy[:, columns_i]   [R_i, size_i]
//
// A block owns a tile of one of these results, 16 or 64 ranks by 64 columns, and a part of the rows
// (a split); it goes over them 64 at a time:
//
//        ds, scale g s [64, ranks]  x  x, dy [64, 64]   -->  a tile [ranks, 64] in registers
//
// Blocks leave their partial sums in memory; the one that draws the last ticket of a tile adds the
// splits in their order, so the result does not depend on which block that was. With banks a block
// works for one member and passes over the rows of others; members that nobody used get zeros. The
// gates' weights, up to four at a time, are summed in float32 by the threads that bring x in: a
// pooled gate's dlogit is small enough to vanish in float16.
//
// Shared memory per block, ranks 16, 64: 28, 41 KB.
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {
namespace {

constexpr int kRows = kWideRows;
constexpr int kGatesAtOnce = 4;
// Blocks that share a multiprocessor's registers. Without a bound the compiler aims at more of them
// and spills.
constexpr int kMinBlocks = 4;
constexpr int kBiasRow = 8;  // of a gate's tile: rows of its own for the biases' sums

template <class T_, int kRanks_>
struct Config {
  using T = T_;
  static constexpr int kRanks = kRanks_;
  static constexpr int kRankStride = kRanks + kTilePad;
  // The warps as a grid over the tile: 16 ranks each, and the columns shared by those that are
  // left.
  static constexpr int kWarpsOverRanks = kRanks / 16;
  static constexpr int kWarpColumns = kChunk / (kWarps / kWarpsOverRanks);
  static constexpr int kTileFloats = kRanks * kChunk;
  static_assert(kWarps % kWarpsOverRanks == 0, "the warps divide the tile evenly");
  static_assert(kWarpColumns % 16 == 0, "fragments of B come in pairs of 8 columns");
  static_assert(kRanks >= kBiasRow + kGatesAtOnce, "the gates' sums fit in a tile");
};

template <class C>
struct Shared {
  using T = typename C::T;
  struct Tile {
    alignas(16) T columns[kRows * kChunkStride];  // x or dy
    alignas(16) T ranks[kRows * C::kRankStride];  // ds or scale g s
  };
  Tile tile[2];  // one in use, one on the way
  // A warp's sums for the gates' weights and biases.
  float gates[kWarps][kGatesAtOnce * kChunk];
  float biases[kWarps][kGatesAtOnce];
  int is_last;
};

// The tile of a result and the part of the rows that a block works on.
struct Work {
  Sums sums;
  int column;    // the tile's first
  int rank;      // likewise
  int member;    // of the branch's bank
  int split;     // which part of the rows
  int64_t task;  // its number among those of all sums
};

// Tasks of one sum count columns fastest: neighbouring blocks read neighbouring columns of the same
// rows.
__device__ __forceinline__ Work find_work(const WeightsParams& p, int rank_block) {
  Work work;
  work.task = block_index_x();
  work.split = block_index_y();
  // The last sum that begins no later than this task.
  int i = 0;
  while (i + 1 < p.count && work.task >= p.sums[i + 1].first_task) ++i;
  work.sums = p.sums[i];
  const int task = static_cast<int>(work.task) - work.sums.first_task;
  work.column = task % work.sums.column_tiles * kChunk;
  work.rank = task / work.sums.column_tiles % work.sums.rank_tiles * rank_block;
  work.member = task / work.sums.column_tiles / work.sums.rank_tiles;
  return work;
}

// Does a tile of rows belong to the member that a block works for.
__device__ __forceinline__ bool is_wanted(const WeightsParams& p, const Work& work, int tile) {
  const Branch& branch = p.in.branch[work.sums.which];
  const int group = tile / p.tiling.tiles_per_group;
  return work.member == (work.sums.kind == Sums::kDownFactor ? member_of_a(branch, group)
                                                             : member_of_b(branch, group));
}

// Both operands of a tile of rows; rows, ranks and columns that do not exist come as zeros.
template <class C>
__device__ __forceinline__ void bring_rows(const WeightsParams& p, typename Shared<C>::Tile& to,
                                           const Work& work, int tile) {
  using T = typename C::T;
  const Linear& in = p.in;
  const Branch& branch = in.branch[work.sums.which];
  const TileRows rows = rows_of_tile<kRows>(p.tiling, tile);
  if (work.sums.kind == Sums::kDownFactor) {
    stage_x<T, kRows>(to.columns, in, rows, work.column, in.dropout.is_active());
    stage<T, kRows, C::kRanks>(to.ranks, C::kRankStride, Parameter{p.ds, false},
                               {rows.first * in.ranks + branch.first + work.rank, in.ranks,
                                rows.count, branch.R - work.rank});
  } else {
    stage<T, kRows, kChunk>(to.columns, kChunkStride, Parameter{p.in.dy, false},
                            {rows.first * in.Dout + branch.offset + work.column, in.Dout,
                             rows.count, branch.size - work.column});
    stage_scaled<T, kRows, C::kRanks>(to.ranks, C::kRankStride, in, branch, rows, work.rank);
  }
}

// A warp's part of the tile: sums [ranks, columns] += ranksᵀ columns over the rows. Rows are the
// reduction, so both operands are transposed on the way into registers.
template <class C>
__device__ __forceinline__ void accumulate(FragmentD (&sums)[C::kWarpColumns / 8],
                                           const typename Shared<C>::Tile& s) {
  const int rank = warp_index() % C::kWarpsOverRanks * 16;
  const int column = warp_index() / C::kWarpsOverRanks * C::kWarpColumns;
#pragma unroll
  for (int k = 0; k < kRows; k += 16) {
    const FragmentA a = load_a_transposed(s.ranks + k * C::kRankStride + rank, C::kRankStride);
#pragma unroll
    for (int n = 0; n < C::kWarpColumns / 8; n += 2) {
      FragmentB b[2];
      load_b_pair_transposed(b, s.columns + k * kChunkStride + column + 8 * n, kChunkStride);
      multiply_add<typename C::T>(sums[n], a, b[0]);
      multiply_add<typename C::T>(sums[n + 1], a, b[1]);
    }
  }
}

// The tiles of rows that a split goes over: all tiles, cut evenly.
struct TileRange {
  int begin, end;
};

__device__ __forceinline__ TileRange tiles_of(const WeightsParams& p, const Work& work) {
  const int64_t tiles = p.tiling.tiles;
  return {static_cast<int>(tiles * work.split / p.splits),
          static_cast<int>(tiles * (work.split + 1) / p.splits)};
}

// A factor's tile over this block's part of the rows. While one tile of rows is multiplied, the
// next one is on the way.
template <class C>
__device__ __forceinline__ void sum_factor(const WeightsParams& p, Shared<C>& s, const Work& work,
                                           float* partial) {
  FragmentD sums[C::kWarpColumns / 8];
  const TileRange range = tiles_of(p, work);
  // The next tile from `tile` on whose sentence the block's member serves.
  auto next_of = [&](int tile) {
    while (tile < range.end && !is_wanted(p, work, tile)) ++tile;
    return tile;
  };
  // A group is committed also where there is no tile: the wait below then means the right one.
  auto bring = [&](int tile, int buffer) {
    if (tile < range.end) bring_rows<C>(p, s.tile[buffer], work, tile);
    cp_async_commit();
  };
  int tile = next_of(range.begin), buffer = 0;
  bring(tile, buffer);
  while (tile < range.end) {
    tile = next_of(tile + 1);
    // This turn's tile is there for all threads, and all have multiplied the one before, whose
    // buffer is filled anew.
    cp_async_wait<0>();
    sync_threads();
    bring(tile, 1 - buffer);
    accumulate<C>(sums, s.tile[buffer]);
    buffer = 1 - buffer;
  }
  // From the fragments to the block's place among the partial sums, [ranks, 64] in float32.
  const int rank = warp_index() % C::kWarpsOverRanks * 16;
  const int column = warp_index() / C::kWarpsOverRanks * C::kWarpColumns;
#pragma unroll
  for (int n = 0; n < C::kWarpColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[(rank + FragmentD::row(i)) * kChunk + column + 8 * n + FragmentD::column(i)] =
          sums[n].r[i];
    }
  }
}

// The gates' tile: eight neighbouring columns and every sixteenth row for each thread.
template <class C>
__device__ __forceinline__ void sum_gates(const WeightsParams& p, Shared<C>& s, const Work& work,
                                          float* partial) {
  using T = typename C::T;
  const Linear& in = p.in;
  const int64_t all = static_cast<int64_t>(in.B) * in.S;
  const int left = in.gates - work.sums.which;
  const int count = left < kGatesAtOnce ? left : kGatesAtOnce;
  // Eight lanes cover the tile's columns, so a warp reads four whole rows at a time.
  const int offset = thread_index() % kVectors * 8, column = work.column + offset;
  Float8 sums[kGatesAtOnce] = {};
  float biases[kGatesAtOnce] = {};
  const TileRange range = tiles_of(p, work);
  for (int tile = range.begin; tile < range.end; ++tile) {
    const TileRows rows = rows_of_tile<kRows>(p.tiling, tile);
    for (int r = thread_index() / kVectors; r < rows.count; r += kThreads / kVectors) {
      const int64_t row = rows.first + r;
      // Read once for up to four gates, straight from memory: each element has one reader.
      Float8 x = {};
      if (column < in.Din) x = load_8(static_cast<const T*>(in.x) + row * in.Din + column);
#pragma unroll
      for (int g = 0; g < kGatesAtOnce; ++g) {
        // A row that does not count is not multiplied by its dlogit of 0: it may hold a NaN.
        if (g >= count || !counts(in, in.gate[work.sums.which + g], row)) continue;
        const float dlogit = p.dlogits[(work.sums.which + g) * all + row];
        biases[g] += dlogit;
        for (int e = 0; e < 8; ++e) sums[g].v[e] += dlogit * x.v[e];
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kGatesAtOnce; ++g) {
    // Over the warp's four rows: lanes with the same columns are kVectors apart.
#pragma unroll
    for (int mask = kVectors; mask < 32; mask *= 2) {
      biases[g] += shfl_xor(biases[g], mask);
      for (int e = 0; e < 8; ++e) sums[g].v[e] += shfl_xor(sums[g].v[e], mask);
    }
    if (lane_index() >= kVectors) continue;  // the first eight lanes hold the warp's sums
    for (int e = 0; e < 8; ++e) s.gates[warp_index()][g * kChunk + offset + e] = sums[g].v[e];
    if (lane_index() == 0) s.biases[warp_index()][g] = biases[g];
  }
  // All four warps' sums are there to be added.
  sync_threads();
  for (int i = thread_index(); i < kGatesAtOnce * kChunk; i += kThreads) {
    partial[i] = (s.gates[0][i] + s.gates[1][i]) + (s.gates[2][i] + s.gates[3][i]);
  }
  if (thread_index() < kGatesAtOnce) {
    const int g = thread_index();
    partial[(kBiasRow + g) * kChunk] =
        (s.biases[0][g] + s.biases[1][g]) + (s.biases[2][g] + s.biases[3][g]);
  }
}

// Adds the splits in their order and writes the result. A member that no row used gets zeros: its
// blocks have left sums of nothing.
template <class C>
__device__ __forceinline__ void write_sums(const WeightsParams& p, const Work& work) {
  using T = typename C::T;
  const Linear& in = p.in;
  const float* partial = p.partial + work.task * p.splits * C::kTileFloats;
  // Element i of the tile over all splits. The ticket has acquired what other blocks wrote.
  auto total = [&](int i) {
    float sum = 0.0f;
#pragma unroll 8  // the loads of a group are under way together; the order of the sum stays
    for (int split = 0; split < p.splits; ++split) {
      sum += partial[static_cast<int64_t>(split) * C::kTileFloats + i];
    }
    return sum;
  };
  if (work.sums.kind == Sums::kGateWeights) {
    // A tile of gates has a gate in each row, and their biases behind them (see kBiasRow).
    for (int i = thread_index(); i < kGatesAtOnce * kChunk; i += kThreads) {
      const int gate = work.sums.which + i / kChunk, d = work.column + i % kChunk;
      if (gate >= in.gates || d >= in.Din) continue;
      const Gate& to = in.gate[gate];
      if (to.dweight.data != nullptr) store_grad<T>(to.dweight, d, total(i));
      if (d == 0 && to.dbias.data != nullptr) {
        store_grad<T>(to.dbias, 0, total((kBiasRow + i / kChunk) * kChunk));
      }
    }
    return;
  }
  const Branch& branch = in.branch[work.sums.which];
  const int64_t R = branch.R;
  for (int i = thread_index(); i < C::kTileFloats; i += kThreads) {
    if (work.sums.kind == Sums::kDownFactor) {
      const int64_t r = work.rank + i / kChunk, d = work.column + i % kChunk;
      if (r >= R || d >= in.Din) continue;
      store_grad<T>(branch.da, (work.member * R + r) * in.Din + d, total(i));
    } else {
      // B lies as [size, R], its sums as [R, size]: neighbouring threads take neighbouring ranks,
      // so that what they write is contiguous.
      const int r = i % C::kRanks, d = i / C::kRanks;
      if (work.rank + r >= R || work.column + d >= branch.size) continue;
      const int64_t row = static_cast<int64_t>(work.member) * branch.size + work.column + d;
      store_grad<T>(branch.db, row * R + work.rank + r, total(r * kChunk + d));
    }
  }
}

// Grid: tasks; splits.
template <class C>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lora_linear_bwd_weights_sm80(const __grid_constant__ WeightsParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Work work = find_work(p, C::kRanks);
  // Its own place for every task and split, so that blocks never add to the same memory.
  float* partial = p.partial + (work.task * p.splits + work.split) * C::kTileFloats;
  if (work.sums.kind == Sums::kGateWeights) {
    sum_gates<C>(p, s, work, partial);
  } else {
    sum_factor<C>(p, s, work, partial);
  }
  // The ticket releases the block's partial sums: all of them must have been written.
  sync_threads();
  if (thread_index() == 0) s.is_last = take_ticket(p.tickets + work.task) == p.splits - 1;
  // Every thread learns whether the block came last, and then sees the other splits' sums.
  sync_threads();
  if (s.is_last != 0) write_sums<C>(p, work);
}

using Configs = TypeList<Config<bf16, 16>, Config<bf16, 64>, Config<f16, 16>, Config<f16, 64>>;

}  // namespace

// Lists the sums that have a gradient to write, and cuts each into tasks.
void plan_sums(WeightsParams& p) {
  const Linear& in = p.in;
  const int rank_block = rank_block_of(in);
  p.count = p.tasks = 0;
  auto add = [&](Sums::Kind kind, int which, int ranks, int columns, int members) {
    Sums& sums = p.sums[p.count++];
    sums.kind = kind, sums.which = which;
    sums.column_tiles = (columns + kChunk - 1) / kChunk;
    sums.rank_tiles = (ranks + rank_block - 1) / rank_block;
    sums.first_task = p.tasks;
    p.tasks += sums.column_tiles * sums.rank_tiles * members;
  };
  for (int i = 0; i < in.branches; ++i) {
    const Branch& branch = in.branch[i];
    if (branch.da.data) add(Sums::kDownFactor, i, branch.R, in.Din, branch.M);
    if (branch.db.data) add(Sums::kUpFactor, i, branch.R, branch.size, branch.N);
  }
  // Gates of one read of x are a sum together, if any of them wants a gradient.
  for (int first = 0; first < in.gates; first += kGatesAtOnce) {
    bool is_wanted = false;
    for (int g = first; g < in.gates && g < first + kGatesAtOnce; ++g) {
      is_wanted |= in.gate[g].dweight.data || in.gate[g].dbias.data;
    }
    if (is_wanted) add(Sums::kGateWeights, first, 1, in.Din, 1);
  }
  // Four blocks for each multiprocessor: more splits would mean more partial sums to add.
  const int wanted = p.tasks == 0 ? 1 : 4 * multiprocessors() / p.tasks;
  p.splits = wanted < 1 ? 1 : wanted > p.tiling.tiles ? p.tiling.tiles : wanted;
}

int64_t partial_floats_of(const WeightsParams& p) {
  return static_cast<int64_t>(p.tasks) * p.splits * rank_block_of(p.in) * kChunk;
}

void launch_weights_sm80(const WeightsParams& p, Stream stream) {
  run_config(Configs{}, p.in.dtype, rank_block_of(p.in), [&](auto tag) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{p.tasks, p.splits, 1, kThreads, sizeof(Shared<C>)};
    launch<lora_linear_bwd_weights_sm80<C>>("lora_linear_bwd_weights_sm80", shape, stream, p);
  });
}

}  // namespace pelt::lora_linear
