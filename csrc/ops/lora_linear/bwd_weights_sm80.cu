// lora_linear, backward: the sums over rows.
//
//   dA_i = ds_i^T dropout(x)   [R_i, Din]        dw = dlogit^T x   [Din],   db = sum of dlogit
//   dB_i^T = (scale g s_i)^T dy[:, columns_i]   [R_i, size_i]
//
// A block owns a tile of one of these results, 16 or 64 ranks by 64 columns, and a part of the rows
// (a split); it goes over them 64 at a time, with two more tiles of rows on the way:
//
//        ds, scale g s [64, ranks]  x  x, dy [64, 64]   -->  a tile [ranks, 64] in registers
//
// Blocks leave their partial sums in memory; the one that draws the last ticket of a tile adds the
// splits in their order, so the result does not depend on which block that was. With banks a block
// works for one member and passes over the rows of others; members that nobody used get zeros. The
// gates' weights, up to four at a time, are summed in float32 by the threads that bring x in: a
// pooled gate's dlogit is small enough to vanish in float16.
//
// Shared memory per block, ranks 16, 64: 41, 59 KB.
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {
namespace {

constexpr int kRows = kWideRows;
constexpr int kGatesAtOnce = 4;
constexpr int kBuffers = 3;
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
  Tile tile[kBuffers];  // one in use, the others on the way
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

// The tiles of rows that a split goes over: all tiles, cut evenly, but for those of sentences that
// another member of the branch's bank serves.
class TileWalk {
 public:
  TileRows rows;

  __device__ __forceinline__ TileWalk(const WeightsParams& p, const Work& work)
      : tiling(p.tiling), member(work.member) {
    const int64_t tiles = p.tiling.tiles;
    tile = static_cast<int>(tiles * work.split / p.splits);
    end = static_cast<int>(tiles * (work.split + 1) / p.splits);
    rows = rows_of_tile<kRows>(tiling, tile);
    if (work.sums.kind == Sums::kGateWeights) return;  // for all rows
    const Branch& branch = p.in.branch[work.sums.which];
    const bool is_down = work.sums.kind == Sums::kDownFactor;
    index = is_down ? branch.a_index : branch.b_index;
    is_per_sample = is_down ? branch.has_a_index_per_sample : branch.has_b_index_per_sample;
    members = is_down ? branch.M : branch.N;
    skip_others();
  }

  __device__ __forceinline__ bool is_over() const { return tile >= end; }

  __device__ __forceinline__ void go_on() {
    step();
    skip_others();
  }

 private:
  __device__ __forceinline__ void step() {
    ++tile;
    rows.first += kRows;
    if (++rows.index_in_group == tiling.tiles_per_group) {
      ++rows.group, rows.index_in_group = 0;
      rows.first = rows.group * tiling.group_rows;
    }
    const int64_t left = tiling.group_rows - static_cast<int64_t>(rows.index_in_group) * kRows;
    rows.count = left < kRows ? static_cast<int>(left) : kRows;
  }

  __device__ __forceinline__ void skip_others() {
    if (members == 1) return;
    while (!is_over() && member != member_of(index, is_per_sample, rows.group, members)) step();
  }

  const Tiling& tiling;
  int tile, end;
  int member;
  const int64_t* index = nullptr;
  bool is_per_sample = false;
  int members = 1;
};

// A thread's share of a tile of rows of both operands; rows, ranks and columns that do not exist come
// as zeros. What lies whole at 16-byte borders comes by addresses that are made once; what has to be
// multiplied or is not whole passes through registers, the former between fetch() and put().
template <class C>
class RowTiles {
  using T = typename C::T;
  using Tile = typename Shared<C>::Tile;
  static constexpr int kRankVectors = C::kRanks / 8;
  static constexpr int kStep = kThreads / kVectors, kRankStep = kThreads / kRankVectors;
  static constexpr int kRankTurns = kRows / kRankStep;

 public:
  __device__ __forceinline__ RowTiles(const WeightsParams& p, Shared<C>& s, const Work& work)
      : p(p), s(s), work(work), branch(p.in.branch[work.sums.which]) {
    const Linear& in = p.in;
    is_down = work.sums.kind == Sums::kDownFactor;
    is_dropped = is_down && in.dropout.is_active();
    const int offset = is_down ? 0 : branch.offset, width = is_down ? in.Din : branch.size;
    leading = is_down ? in.Din : in.Dout;
    has_whole_columns = offset % 8 == 0 && width % 8 == 0;
    const int vector = thread_index() % kVectors * 8;
    row = thread_index() / kVectors;
    rows_of_columns = work.column + vector < width ? kRows : 0;
    columns = static_cast<const T*>(is_down ? in.x : in.dy) + static_cast<int64_t>(row) * leading +
              offset + work.column + vector;
    columns_to = kept_address(shared_address(s.tile[0].columns + row * kChunkStride + vector));
    has_whole_ranks = in.ranks % 8 == 0 && branch.first % 8 == 0 && branch.R % 8 == 0;
    const int rank = thread_index() % kRankVectors * 8;
    rank_row = thread_index() / kRankVectors;
    rows_of_ranks = work.rank + rank < branch.R ? kRows : 0;
    ranks = static_cast<const T*>(is_down ? p.ds : in.s) +
            static_cast<int64_t>(rank_row) * in.ranks + branch.first + work.rank + rank;
    ranks_to = kept_address(shared_address(s.tile[0].ranks + rank_row * C::kRankStride + rank));
  }

  // Asks for a tile of rows.
  __device__ __forceinline__ void fetch(const TileRows& rows, int buffer) {
    fetch_columns(rows, buffer);
    if (has_whole_ranks) {
      fetch_ranks(rows, buffer);
    } else if (is_down) {
      stage<T, kRows, C::kRanks>(s.tile[buffer].ranks, C::kRankStride, Parameter{p.ds, false},
                                 {rows.first * p.in.ranks + branch.first + work.rank, p.in.ranks,
                                  rows.count, branch.R - work.rank});
    } else {
      stage_scaled<T, kRows, C::kRanks>(s.tile[buffer].ranks, C::kRankStride, p.in, branch, rows,
                                        work.rank);
    }
  }

  // Stores what fetch() has left in registers: scale g s.
  __device__ __forceinline__ void put(int buffer) const {
    if (is_down || !has_whole_ranks) return;
#pragma unroll
    for (int turn = 0; turn < kRankTurns; ++turn) {
      Float8 values = widen<T>(held[turn]);
      for (int e = 0; e < 8; ++e) values.v[e] *= factor[turn];
      constexpr int kBytes = kRankStep * C::kRankStride * sizeof(T);
      store_shared_16(ranks_to + buffer * sizeof(Tile) + turn * kBytes, narrow<T>(values));
    }
  }

 private:
  __device__ __forceinline__ void fetch_columns(const TileRows& rows, int buffer) {
    if (is_dropped) {
      stage_dropped_x<T, kRows>(s.tile[buffer].columns, p.in, rows, work.column);
      return;
    }
    if (!has_whole_columns) {  // of dy: x has whole rows
      stage<T, kRows, kChunk>(s.tile[buffer].columns, kChunkStride, Parameter{p.in.dy, false},
                              {rows.first * leading + branch.offset + work.column, leading,
                               rows.count, branch.size - work.column});
      return;
    }
    const T* from = columns + rows.first * leading;
    const int left = rows.count - kRows + rows_of_columns - row;
    const uint32_t to = columns_to + buffer * sizeof(Tile);
    for_constants<kRows / kStep>([&](auto turn) {
      constexpr int kRow = decltype(turn)::value * kStep;
      cp_async_16_at<kRow * kChunkStride* static_cast<int>(sizeof(T))>(to, from,
                                                                       kRow < left ? 16 : 0);
      from += static_cast<int64_t>(kStep) * leading;
    });
  }

  __device__ __forceinline__ void fetch_ranks(const TileRows& rows, int buffer) {
    const T* from = ranks + rows.first * p.in.ranks;
    const int left = rows.count - kRows + rows_of_ranks - rank_row;
    const uint32_t to = ranks_to + buffer * sizeof(Tile);
    for_constants<kRankTurns>([&](auto turn) {
      constexpr int i = decltype(turn)::value, kRow = i * kRankStep;
      const bool is_there = kRow < left;
      if (is_down) {
        cp_async_16_at<kRow * C::kRankStride* static_cast<int>(sizeof(T))>(to, from,
                                                                           is_there ? 16 : 0);
      } else {
        held[i] = is_there ? load_global_16(from) : Words4{};
        factor[i] = is_there ? factor_of<T>(p.in, branch, rows.first + rank_row + kRow) : 0.0f;
      }
      from += static_cast<int64_t>(kRankStep) * p.in.ranks;
    });
  }

  const WeightsParams& p;
  Shared<C>& s;
  const Work& work;
  const Branch& branch;
  bool is_down, is_dropped, has_whole_columns, has_whole_ranks;
  int leading;                         // of x or dy
  const T *columns, *ranks;            // the thread's first vectors of row 0
  int row, rank_row;                   // of them in the tile
  int rows_of_columns, rows_of_ranks;  // of a whole tile: none where the vectors do not exist
  uint32_t columns_to, ranks_to;       // in the first buffer
  Words4 held[kRankTurns];             // of s
  float factor[kRankTurns];
};

// A warp's part of the tile: sums [ranks, columns] += ranksᵀ columns over the rows. Rows are the
// reduction, so both operands are transposed on the way into registers. `ranks` and `columns` are
// the lane's addresses.
template <class C>
__device__ __forceinline__ void accumulate(FragmentD (&sums)[C::kWarpColumns / 8], uint32_t ranks,
                                           uint32_t columns) {
  using T = typename C::T;
  for_constants<kRows / 16>([&](auto step) {
    constexpr int k = 16 * decltype(step)::value, kBytes = sizeof(T);
    FragmentA a;
    ldmatrix_x4_trans_at<kBytes * k * C::kRankStride>(a.r, ranks);
    for_constants<C::kWarpColumns / 16>([&](auto pair) {
      constexpr int n = 2 * decltype(pair)::value;
      FragmentB b[2];
      load_b_pair_at<true, kBytes*(k * kChunkStride + 8 * n)>(b, columns);
      multiply_add<T>(sums[n], a, b[0]);
      multiply_add<T>(sums[n + 1], a, b[1]);
    });
  });
}

// A factor's tile over this block's part of the rows.
template <class C>
__device__ __forceinline__ void sum_factor(const WeightsParams& p, Shared<C>& s, const Work& work,
                                           float* partial) {
  using T = typename C::T;
  constexpr int kTile = sizeof(typename Shared<C>::Tile);
  FragmentD sums[C::kWarpColumns / 8];
  RowTiles<C> tiles(p, s, work);
  TileWalk ahead(p, work);
  int under_way = 0;
  // A group is committed also where there is no tile: the wait below then means the right one.
  for (int buffer = 0; buffer < kBuffers - 1; ++buffer) {
    if (!ahead.is_over()) {
      tiles.fetch(ahead.rows, buffer);
      tiles.put(buffer);
      ahead.go_on();
      ++under_way;
    }
    cp_async_commit();
  }
  const int rank = warp_index() % C::kWarpsOverRanks * 16;
  const int column = warp_index() / C::kWarpsOverRanks * C::kWarpColumns;
  const int lane = lane_index();
  const uint32_t of_ranks = kept_address(shared_address(
      s.tile[0].ranks + (lane % 8 + lane / 16 * 8) * C::kRankStride + lane / 8 % 2 * 8 + rank));
  const uint32_t of_columns = kept_address(
      shared_address(s.tile[0].columns + lane % 16 * kChunkStride + lane / 16 * 8 + column));
  int buffer = 0, newest = kBuffers - 1;
  for (; under_way > 0; --under_way) {
    // This turn's tile is there for all threads, and all have multiplied the one before, whose
    // buffer is filled anew.
    cp_async_wait<kBuffers - 2>();
    sync_threads();
    const bool has_next = !ahead.is_over();
    if (has_next) tiles.fetch(ahead.rows, newest);
    cp_async_commit();
    accumulate<C>(sums, of_ranks + buffer * kTile, of_columns + buffer * kTile);
    if (has_next) {
      tiles.put(newest);
      ahead.go_on();
      ++under_way;
    }
    newest = buffer;
    buffer = buffer == kBuffers - 1 ? 0 : buffer + 1;
  }
  // From the fragments to the block's place among the partial sums, [ranks, 64] in float32.
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
  for (TileWalk walk(p, work); !walk.is_over(); walk.go_on()) {
    const TileRows& rows = walk.rows;
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

struct Float4 {
  float v[4];
};

// Adds the splits in their order and writes the result. A member that no row used gets zeros: its
// blocks have left sums of nothing.
template <class C>
__device__ __forceinline__ void write_sums(const WeightsParams& p, const Work& work) {
  using T = typename C::T;
  const Linear& in = p.in;
  const float* partial = p.partial + work.task * p.splits * C::kTileFloats;
  // Elements i to i + 3 of the tile over all splits. The ticket has acquired what other blocks wrote.
  auto total = [&](int i) {
    Float4 sum = {};
#pragma unroll 8  // the loads of a group are under way together; the order of the sum stays
    for (int split = 0; split < p.splits; ++split) {
      const Words4 part = load_16(partial + static_cast<int64_t>(split) * C::kTileFloats + i);
      for (int e = 0; e < 4; ++e) sum.v[e] += float_from_bits(part.word[e]);
    }
    return sum;
  };
  if (work.sums.kind == Sums::kGateWeights) {
    // A tile of gates has a gate in each row, and their biases behind them (see kBiasRow).
    for (int i = 4 * thread_index(); i < kGatesAtOnce * kChunk; i += 4 * kThreads) {
      const int gate = work.sums.which + i / kChunk, d = work.column + i % kChunk;
      // Columns come in whole vectors: their number is a multiple of 8 (see why_not).
      if (gate >= in.gates || d >= in.Din) continue;
      const Gate& to = in.gate[gate];
      if (to.dweight.data != nullptr) {
        const Float4 sum = total(i);
        for (int e = 0; e < 4; ++e) store_grad<T>(to.dweight, d + e, sum.v[e]);
      }
      if (d == 0 && to.dbias.data != nullptr) {
        // Of the bias's row the first element alone has been written.
        const float* bias = partial + (kBiasRow + i / kChunk) * kChunk;
        float sum = 0.0f;
        for (int split = 0; split < p.splits; ++split) sum += bias[split * C::kTileFloats];
        store_grad<T>(to.dbias, 0, sum);
      }
    }
    return;
  }
  const Branch& branch = in.branch[work.sums.which];
  const int64_t R = branch.R;
  for (int i = thread_index(); i < C::kTileFloats / 4; i += kThreads) {
    if (work.sums.kind == Sums::kDownFactor) {
      const int64_t r = work.rank + i / (kChunk / 4), d = work.column + i % (kChunk / 4) * 4;
      if (r >= R || d >= in.Din) continue;
      const Float4 sum = total(4 * i);
      const int64_t at = (work.member * R + r) * in.Din + d;
      for (int e = 0; e < 4; ++e) store_grad<T>(branch.da, at + e, sum.v[e]);
    } else {
      // B lies as [size, R], its sums as [R, size]: neighbouring threads take neighbouring ranks,
      // so that what they write is contiguous.
      const int r = i % C::kRanks, d = i / C::kRanks * 4;
      if (work.rank + r >= R || work.column + d >= branch.size) continue;
      const Float4 sum = total(r * kChunk + d);
      const int64_t row = static_cast<int64_t>(work.member) * branch.size + work.column + d;
      for (int e = 0; e < 4; ++e) {
        if (work.column + d + e >= branch.size) break;
        store_grad<T>(branch.db, (row + e) * R + work.rank + r, sum.v[e]);
      }
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
