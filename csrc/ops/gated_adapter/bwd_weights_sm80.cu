// gated_adapter, backward, second of two launches: the sums over rows.
//
//   dW_downᵀ = pre_norm(x)ᵀ dh   [D, R]       db_down = sum of dh        dw_gate = sum of dlogit x
//   dW_up    = dropout(dy)ᵀ a    [D, R]       db_up   = sum of scale g dropout(dy)
//
// a = scale g phi(h) and dh come from the first launch in 16 bits, with rows that start at 16-byte
// borders; with a post-norm du stands for dy, and a is phi(h). A block owns a tile of both weights'
// gradients, 64 columns by a block of ranks, and a part of the rows (a split), 64 at a time:
//
//        xᵀ, dyᵀ [64, 64]  x  dh, a [64, ranks]   -->  two tiles [64, ranks] in registers
//
// Two warps multiply x by dh and two dy by a, each of them 32 columns by all ranks of the block, so
// that a fragment of one side serves many of the other. A ring of three stages is filled by
// cp.async. dw_gate and db_up are sums of the same rows: the numbers that weight them, dlogit and
// scale g, are one more operand of eight columns, in parts (parts.cuh).
//
// x and dy are read a second time here, because a sum over rows cannot start before a row's dh, and
// two tiles of a block's partial sums do not fit beside forward's shared memory. Each of their
// elements is read by one block for each 64 ranks.
//
// Splits leave their partial sums in memory; the block that draws the last ticket of a tile adds
// them in their order, so the result does not depend on which block that was. With banks, a block
// works for one member and passes over the rows of others; members that nobody used get zeros. The
// first blocks of the grid add up what is left: gradients of the norms, of scale and of a given
// gate.
//
// Shared memory per block, rank block 16, 48, 64: 74, 98, 111 KB.
#include "common/check.h"
#include "ops/gated_adapter/weight_stages.cuh"

namespace pelt::gated_adapter {
namespace {

constexpr int kWarpColumns = 32;         // of a tile, for each of the two warps of a weight
constexpr int kOutColumns = kChunk + 4;  // floats from rank to rank of the tile that goes out
static_assert(kWarps / 2 * kWarpColumns == kChunk, "two warps have the columns of a tile");

template <class C>
struct Shared {
  union {
    Stage<C> stage[kStages];
    struct {                                                // behind the last stage
      alignas(16) float down[C::kRankBlock * kOutColumns];  // [ranks, columns]
      alignas(16) float up[kChunk * C::kRankStride];        // [columns, ranks]
    } out;
  };
  float parts[2 * kChunk][4];                  // sums of dw_gate's and of db_up's parts
  float sums[kWarps][kChunk + C::kRankBlock];  // a warp's share of dw_gate and db_down
  float scalar[kWarps];                        // a warp's share of a sum
  int is_last;                                 // the block that adds the splits
};

// Neighbouring blocks have neighbouring columns of the same rows: together they read whole rows.
template <class C>
__device__ __forceinline__ Work find_work(const BackwardParams& p) {
  Work work;
  int block = block_index_x() - p.layer_blocks;
  const int column_tile = block % p.column_tiles;
  block /= p.column_tiles;
  const int rank_tile = block % p.rank_tiles;
  block /= p.rank_tiles;
  work.split = block % p.splits;
  work.member = block / p.splits;
  work.column = column_tile * kChunk;
  work.rank = rank_tile * C::kRankBlock;
  work.tile =
      (static_cast<int64_t>(work.member) * p.rank_tiles + rank_tile) * p.column_tiles + column_tile;
  return work;
}

// A warp's part of a tile of a weight's gradient, [columns, ranks].
template <class C>
using WarpSums = FragmentD[kWarpColumns / 16][C::kRankTiles];

// Of its parts of dlogit or of the factor, [columns, parts].
using PartSums = FragmentD[kWarpColumns / 16];

// The weight that a warp works for, and the first of its columns of the tile.
__device__ __forceinline__ int weight_of_warp() { return warp_index() / 2; }
__device__ __forceinline__ int column_of_warp() { return warp_index() % 2 * kWarpColumns; }

// sums += columnsᵀ ranks over the rows of a stage, and likewise parts, of dlogit or of the factor.
// The rows are the depth of the product, so all fragments are loaded transposed.
template <class C>
__device__ __forceinline__ void multiply(const Stage<C>& stage, bool has_ranks, bool has_parts,
                                         WarpSums<C>& sums, PartSums& parts) {
  using T = typename C::T;
  const T* columns = stage.columns[weight_of_warp()] + column_of_warp();
  const T* ranks = stage.ranks[weight_of_warp()];
#pragma unroll
  for (int k = 0; k < kWeightRows; k += 16) {
    FragmentA a[kWarpColumns / 16];
#pragma unroll
    for (int m = 0; m < kWarpColumns / 16; ++m) {
      a[m] = load_a_transposed(columns + k * kChunkStride + 16 * m, kChunkStride);
    }
    if (has_parts) {
      FragmentB b;
      ldmatrix_x2_trans(b.r, ranks + (k + lane_index() % 16) * C::kRankStride + C::kRankBlock);
#pragma unroll
      for (int m = 0; m < kWarpColumns / 16; ++m) multiply_add<T>(parts[m], a[m], b);
    }
    if (!has_ranks) continue;
#pragma unroll
    for (int n = 0; n < C::kRankTiles; n += 2) {
      FragmentB b[2];
      load_b_pair_transposed(b, ranks + k * C::kRankStride + 8 * n, C::kRankStride);
#pragma unroll
      for (int m = 0; m < kWarpColumns / 16; ++m) {
        multiply_add<T>(sums[m][n], a[m], b[0]);
        multiply_add<T>(sums[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// What a block has summed: a warp its part of a tile, a thread its share of the vectors.
template <class C>
struct BlockSums {
  WarpSums<C> tile;
  PartSums parts;  // of dw_gate or of db_up
  VectorSums vectors;
};

// The sums over the split's part of the rows.
template <class C>
__device__ __forceinline__ void sum_rows(const BackwardParams& p, Shared<C>& s, const Work& work,
                                         int wanted, int of_all, BlockSums<C>& sums) {
  // The splits differ by one tile of rows at most.
  const int64_t tiles = p.weight_tiling.tiles;
  const int begin = static_cast<int>(tiles * work.split / p.splits);
  const int end = static_cast<int>(tiles * (work.split + 1) / p.splits);
  const Places<C> places = places_of<C>(p, work);
  auto find = [&](int tile) { return find_step(p, work, wanted, of_all, tile, end); };
  const bool is_whole =
      work.column + kChunk <= p.in.D && work.rank + C::kRankBlock <= p.rank_stride;
  // A group is committed also where there is no tile: the wait below counts groups.
  auto bring_to = [&](int buffer, const Step& step) {
    if (step.tile < end && step.count == kWeightRows && is_whole) {
      bring<C, true>(p, s.stage[buffer], places, step);
    } else if (step.tile < end) {
      bring<C, false>(p, s.stage[buffer], places, step);
    }
    cp_async_commit();
  };
  const bool is_up = weight_of_warp() == kUp;
  // With a pre-norm the product does not see the gate's x.
  constexpr int kGateOfProduct = C::kIsPlain ? kGateRow : 0;
  static_assert(kStages == 3, "one step is multiplied, two are on the way");
  Step step = {begin - 1, 0, 0, 0}, next = step;  // nothing: the first two turns only bring
  for (int buffer = 0; step.tile < end; buffer = buffer == kStages - 1 ? 0 : buffer + 1) {
    Stage<C>& stage = s.stage[buffer];
    cp_async_wait<kStages - 2>();  // this thread's copies of the step have landed
    if (!C::kIsPlain) {
      settle_x<C>(p, stage, places, step, sums.vectors);
      settle_dy<C>(p, stage, places, step);
    }
    settle_dh<C>(stage, places, step, sums.vectors);
    // The whole stage is there and settled, and everybody has multiplied the step before, whose
    // buffer is filled anew.
    sync_threads();
    const Step last = find(next.tile + 1);
    bring_to(buffer == 0 ? kStages - 1 : buffer - 1, last);
    const bool has_ranks = (step.sums & (is_up ? kUpTile : kDownTile)) != 0;
    const bool has_parts = (step.sums & (is_up ? kUpBias : kGateOfProduct)) != 0;
    if (has_ranks || has_parts) multiply<C>(stage, has_ranks, has_parts, sums.tile, sums.parts);
    step = next;
    next = last;
  }
}

// Adds the threads' shares of a vector, eight elements to each of kGroups neighbouring threads,
// over the warp; the sums of the block's four warps are added in shared memory later.
template <int kGroups>
__device__ __forceinline__ void leave_vector(float* warp_sums, int elements, Float8 values) {
  for (int e = 0; e < 8; ++e) {
    // Lanes with the same eight elements are kGroups apart.
    for (int mask = kGroups; mask < 32; mask *= 2) values.v[e] += shfl_xor(values.v[e], mask);
    if (lane_index() < kGroups && lane_index() * 8 < elements) {
      warp_sums[lane_index() * 8 + e] = values.v[e];
    }
  }
}

// A thread's share of what the block has summed of the vectors, for memory: an element of db_up or
// dw_gate, and one of db_down.
struct VectorShare {
  float column;
  float rank;
};

template <class C>
__device__ __forceinline__ VectorShare share_vectors(Shared<C>& s, const BlockSums<C>& sums) {
  // The parts' sums are where a warp's first two lanes of four have columns 0 to 3.
  if (FragmentD::column(0) < kParts) {
#pragma unroll
    for (int m = 0; m < kWarpColumns / 16; ++m) {
      for (int i = 0; i < 4; ++i) {
        const int column = column_of_warp() + 16 * m + FragmentD::row(i);
        s.parts[weight_of_warp() * kChunk + column][FragmentD::column(i)] = sums.parts[m].r[i];
      }
    }
  }
  float* warp_sums = s.sums[warp_index()];
  if (!C::kIsPlain) leave_vector<kVectors>(warp_sums, kChunk, sums.vectors.dw_gate);
  leave_vector<C::kRankLanes>(warp_sums + kChunk, C::kRankBlock, sums.vectors.db_down);
  sync_threads();  // all four warps' sums are there
  auto total = [&](int i) { return (s.sums[0][i] + s.sums[1][i]) + (s.sums[2][i] + s.sums[3][i]); };
  static_assert(2 * kChunk == kThreads, "a thread has one element of dw_gate and db_up");
  const int i = thread_index();
  const float parts[kParts] = {s.parts[i][0], s.parts[i][1], s.parts[i][2]};
  VectorShare share = {join_parts<typename C::T>(parts), 0.0f};
  if (!C::kIsPlain && i < kChunk) share.column = total(i);
  if (i < C::kRankBlock) share.rank = total(kChunk + i);
  return share;
}

// Four sums of a fragment, moved as floats: as bits, the loop over rows would carry them so.
struct alignas(16) Float4 {
  float v[4];
};

// Leaves the block's sums among those of the other splits and draws a ticket; true for the last
// block of a tile, which then has the sums of all splits, added in their order. A thread finds in
// memory what the same thread of another block has left.
template <class C>
__device__ __forceinline__ bool add_splits(const BackwardParams& p, Shared<C>& s, const Work& work,
                                           WarpSums<C>& sums, VectorShare& vectors) {
  // [splits, kPartialFloats]
  float* tile = p.weight_partial + work.tile * p.splits * C::kPartialFloats;
  float* own = tile + static_cast<int64_t>(work.split) * C::kPartialFloats;
  constexpr int kVectorsBegin = 2 * C::kTileFloats;
  const int i = thread_index();
#pragma unroll
  for (int m = 0; m < kWarpColumns / 16; ++m) {
#pragma unroll
    for (int n = 0; n < C::kRankTiles; ++n) {
      const float (&r)[4] = sums[m][n].r;
      reinterpret_cast<Float4*>(own)[(m * C::kRankTiles + n) * kThreads + i] = {
          {r[0], r[1], r[2], r[3]}};
    }
  }
  own[kVectorsBegin + i] = vectors.column;
  if (i < C::kRankBlock) own[kVectorsBegin + kThreads + i] = vectors.rank;
  sync_threads();  // the whole block has written its partial sums before they are announced
  if (i == 0) s.is_last = take_ticket(p.tickets + work.tile) == p.splits - 1;
  sync_threads();  // is_last is there, and with it what the other blocks wrote
  if (s.is_last == 0) return false;

  // The block's own sums are in memory with the others.
#pragma unroll
  for (int m = 0; m < kWarpColumns / 16; ++m) {
#pragma unroll
    for (int n = 0; n < C::kRankTiles; ++n) sums[m][n] = FragmentD{};
  }
  vectors = {};
  for (int split = 0; split < p.splits; ++split) {
    const float* from = tile + static_cast<int64_t>(split) * C::kPartialFloats;
#pragma unroll
    for (int m = 0; m < kWarpColumns / 16; ++m) {
#pragma unroll
      for (int n = 0; n < C::kRankTiles; ++n) {
        const Float4 r =
            reinterpret_cast<const Float4*>(from)[(m * C::kRankTiles + n) * kThreads + i];
        for (int e = 0; e < 4; ++e) sums[m][n].r[e] += r.v[e];
      }
    }
    vectors.column += from[kVectorsBegin + i];
    if (i < C::kRankBlock) vectors.rank += from[kVectorsBegin + kThreads + i];
  }
  return true;
}

// Eight neighbouring elements of a gradient that is wanted; i is a multiple of 8.
template <class T>
__device__ __forceinline__ void store_grad_8(const ParameterGrad& grad, int64_t i,
                                             const Float8& values) {
  if (grad.is_float32) {
    float* to = static_cast<float*>(grad.data) + i;
    for (int half = 0; half < 2; ++half) {
      Words4 words;
      for (int e = 0; e < 4; ++e) words.word[e] = bits_of(values.v[4 * half + e]);
      store_16(to + 4 * half, words);
    }
  } else {
    store_16(static_cast<T*>(grad.data) + i, narrow<T>(values));
  }
}

// Writes the gradients. The tiles pass through shared memory, so that neighbouring threads write
// neighbouring elements, whichever way a weight lies.
template <class C>
__device__ __forceinline__ void write_gradients(const BackwardParams& p, Shared<C>& s,
                                                const Work& work, int wanted,
                                                const WarpSums<C>& sums,
                                                const VectorShare& vectors) {
  using T = typename C::T;
  const Call& in = p.in;
  const bool is_up = weight_of_warp() == kUp;
  sync_threads();  // the tiles lie in the place of the last stage, which has been multiplied
#pragma unroll
  for (int m = 0; m < kWarpColumns / 16; ++m) {
#pragma unroll
    for (int n = 0; n < C::kRankTiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int column = column_of_warp() + 16 * m + FragmentD::row(i);
        const int rank = 8 * n + FragmentD::column(i);
        float* to = is_up ? &s.out.up[column * C::kRankStride + rank]
                          : &s.out.down[rank * kOutColumns + column];
        *to = sums[m][n].r[i];
      }
    }
  }
  sync_threads();  // both tiles are there
  const int64_t R = in.R, D = in.D;
  // The banks may have different sizes; the grid has as many members as the larger one.
  const bool has_down = work.member < in.M, has_up = work.member < in.M_up;
  if ((wanted & kDownTile) && has_down) {  // lies as [R, D]
    for (int i = thread_index(); i < C::kRankBlock * kVectors; i += kThreads) {
      const int rank = i / kVectors, offset = i % kVectors * 8;
      if (work.rank + rank >= R || work.column + offset >= D) continue;
      Float8 values;
      for (int e = 0; e < 8; ++e) values.v[e] = s.out.down[rank * kOutColumns + offset + e];
      store_grad_8<T>(in.parameter_grad(kWDown),
                      (work.member * R + work.rank + rank) * D + work.column + offset, values);
    }
  }
  if ((wanted & kUpTile) && has_up) {  // lies as [D, R], its rows at any border
    for (int i = thread_index(); i < kChunk * C::kRankVectors; i += kThreads) {
      const int column = i / C::kRankVectors, offset = i % C::kRankVectors * 8;
      if (work.column + column >= D) continue;
      const int64_t at = (work.member * D + work.column + column) * R + work.rank + offset;
      Float8 values;
      for (int e = 0; e < 8; ++e) values.v[e] = s.out.up[column * C::kRankStride + offset + e];
      if (R % 8 == 0) {
        if (work.rank + offset < R) store_grad_8<T>(in.parameter_grad(kWUp), at, values);
        continue;
      }
      for (int e = 0; e < 8; ++e) {
        if (work.rank + offset + e < R) store_grad<T>(in.parameter_grad(kWUp), at + e, values.v[e]);
      }
    }
  }
  const int i = thread_index(), column = work.column + i % kChunk;
  if (i < kChunk && column < D && (wanted & kGateRow)) {
    store_grad<T>(in.parameter_grad(kGateWeight), column, vectors.column);
  }
  if (i >= kChunk && column < D && (wanted & kUpBias) && has_up) {
    store_grad<T>(in.parameter_grad(kBUp), work.member * D + column, vectors.column);
  }
  if (i < C::kRankBlock && work.rank + i < R && (wanted & kDownBias) && has_down) {
    store_grad<T>(in.parameter_grad(kBDown), work.member * R + work.rank + i, vectors.rank);
  }
}

// A block's tile of the weights' gradients, for its split of the rows.
template <class C>
__device__ __forceinline__ void sum_tile(const BackwardParams& p, Shared<C>& s) {
  const Work work = find_work<C>(p);
  const int wanted = wanted_of(p, work), of_all = wanted_of_all(p.in, work, wanted);
  BlockSums<C> sums;
  // A member that serves no row gets zeros, which one block has without the others.
  const bool is_used = has_weights_per_sample(p.in) || of_all != 0;
  if (!is_used && work.split > 0) return;
  if (is_used) sum_rows<C>(p, s, work, wanted, of_all, sums);
  VectorShare share = share_vectors<C>(s, sums);
  // Nobody waits: whoever comes last to a tile does the rest.
  if (is_used && p.splits > 1 && !add_splits<C>(p, s, work, sums.tile, share)) return;
  write_gradients<C>(p, s, work, wanted, sums.tile, share);
}

// Gradients of the norms, or of one member of their banks: the sums that the blocks of the first
// launch left, or its tiles, in their order. Two halves of the block take every second one.
template <class C>
__device__ __forceinline__ void reduce_norms(const BackwardParams& p, Shared<C>& s, int member,
                                             int column) {
  const Call& in = p.in;
  const int norms = norms_of(in);
  const bool by_tile = leaves_norms_by_tile(in);
  const int slots = by_tile ? p.tiling.tiles : *p.norm_slots;
  const int64_t D = in.D, d = column + thread_index() % kChunk;
  const int half = thread_index() / kChunk;  // of the block: 64 columns, every second slot
  // In the order in which the first launch left them: weight and bias of each norm that is there.
  for (int vector = 0; vector < 2 * norms; ++vector) {
    const bool is_pre = vector < 2 && has_pre_norm(in), is_weight = vector % 2 == 0;
    const bool is_bank = is_pre ? has_pre_norm_bank(in) : has_post_norm_bank(in);
    const int members = !is_bank ? 1 : is_pre ? in.M : in.M_up;
    if (member >= members) continue;  // of the other norm's bank
    const int64_t* index = in.input_as<int64_t>(is_pre ? kDownIndex : kUpIndex);
    const bool is_per_sample = is_pre ? has_down_index_per_sample(in) : has_up_index_per_sample(in);
    // What rows of other members have left is not read.
    auto is_of_member = [&](int slot) {
      const int group = by_tile ? slot / p.tiling.tiles_per_group : 0;
      return !is_bank || member_of(index, is_per_sample, group, members) == member;
    };
    const float* from = p.norm_partial + (2 * half * norms + vector) * D + d;
    float sum = 0.0f;
#pragma unroll 4  // the loads of a group are under way together; the order of the sum stays
    for (int slot = half; slot < slots && d < D; slot += 2, from += 4 * norms * D) {
      if (is_of_member(slot)) sum += *from;
    }
    s.sums[half][thread_index() % kChunk] = sum;
    sync_threads();  // both halves are there
    const ParameterGrad grad = is_pre
                                   ? in.parameter_grad(is_weight ? kPreNormWeight : kPreNormBias)
                                   : in.parameter_grad(is_weight ? kPostNormWeight : kPostNormBias);
    if (half == 0 && d < D) {
      store_grad<typename C::T>(grad, (is_bank ? member * D : 0) + d,
                                s.sums[0][thread_index()] + s.sums[1][thread_index()]);
    }
    sync_threads();  // they have been read, the next vector may replace them
  }
}

// One of the sums that tiles of the first launch left, over all of them, by the whole block.
template <class C>
__device__ __forceinline__ float sum_tiles(Shared<C>& s, const BackwardParams& p, TileSum which) {
  float sum = 0.0f;
  // Always by one block of kThreads: the order of the sum depends on nothing.
  for (int tile = thread_index(); tile < p.tiling.tiles; tile += kThreads) {
    sum += *tile_sum(p, which, tile);
  }
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
  const int block = block_index_x(), blocks = p.layer_blocks;
  if (block == 0 && in.grad[kScale] != nullptr) {
    const float sum = sum_tiles<C>(s, p, kGatedDot);
    if (thread_index() == 0) store_grad<T>(in.parameter_grad(kScale), 0, in.scale_value * sum);
  }
  if (block == 0 && in.grad[kGateBias] != nullptr) {
    const float sum = sum_tiles<C>(s, p, kDLogitSum);
    if (thread_index() == 0) store_grad<T>(in.parameter_grad(kGateBias), 0, sum);
  }
  if (in.grad[kGate] == nullptr) return;
  const float scale = scale_of<T>(in);
  if (has_gate_per_row(in)) {  // nothing to add: the blocks share the rows
    const int64_t rows = rows_of(in), step = static_cast<int64_t>(blocks) * kThreads;
    for (int64_t row = block * kThreads + thread_index(); row < rows; row += step) {
      store_grad<T>(in.parameter_grad(kGate), row, scale * *row_scalar(p, kDot, row));
    }
    return;
  }
  // A warp for each sentence.
  for (int b = block * kWarps + warp_index(); b < in.B; b += blocks * kWarps) {
    float sum = 0.0f;
    for (int t = lane_index(); t < in.S; t += 32) {
      sum += *row_scalar(p, kDot, static_cast<int64_t>(b) * in.S + t);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) store_grad<T>(in.parameter_grad(kGate), b, scale * sum);
  }
}

// Grid: the layer of the norms and scalars, which is little work and starts first; then the tiles of
// the weights' gradients, for each member and split.
template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    gated_adapter_bwd_weights_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  if (block_index_x() >= p.layer_blocks) {
    sum_tile<C>(p, s);
    return;
  }
  // Fewer blocks than columns mean that there are no norms.
  if (norms_of(p.in) > 0) {
    reduce_norms<C>(p, s, block_index_x() / p.column_tiles,
                    block_index_x() % p.column_tiles * kChunk);
  }
  reduce_scalars<C>(p, s);
}

using Configs = WeightConfigsOf<Config>;

}  // namespace

void launch_bwd_weights_sm80(const BackwardParams& p) {
  const bool is_plain = !has_pre_norm(p.in) && (!p.in.dropout.is_active() || has_post_norm(p.in));
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype &&
               C::kRankBlock == weight_ranks(p.in.dtype, p.in.R) && C::kIsPlain == is_plain;
      },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        LaunchShape shape;
        shape.blocks_x = p.layer_blocks + static_cast<int>(weight_tiles_of(p)) * p.splits;
        shape.threads = kThreads;
        shape.shared_bytes = sizeof(Shared<C>);
        launch<gated_adapter_bwd_weights_sm80<C>>("gated_adapter_bwd_weights_sm80", shape,
                                                  p.in.stream, p);
      });
  check(found, "gated_adapter_bwd_weights_sm80: expected a call that why_not serves, got ",
        name_of(p.in.dtype));
}

}  // namespace pelt::gated_adapter
