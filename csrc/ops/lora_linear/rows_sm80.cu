// lora_linear, backward: what each row of dy says about the ranks.
//
//   raw = dy[:, columns_i] B_i        ds = scale g raw  [B * S, ΣR]        dot = <raw, s>
//
// The dot is what the gradient of a branch's gate is a sum of: no branch output is made again. A
// block takes 32 rows and 16 or 64 ranks of one branch (see narrow.cuh); dots of a branch with more
// ranks than that are in parts, added up by the launch that reads them.
//
// Shared memory per block, ranks 16, 64: 38, 70 KB.
#include "ops/lora_linear/narrow.cuh"

namespace pelt::lora_linear {
namespace {

// The operands' chunks: dy and rows of B. Where the branch's columns of dy or its ranks are not whole
// vectors at 16-byte borders, both are staged element by element.
template <class C>
struct OperandCopies {
  using T = typename C::T;
  static constexpr int kAcross = C::kRanks / 8, kStep = kThreads / kAcross;  // rows of B a turn
  static constexpr int kTurns = kChunk / kStep;

  const Linear& in;
  const Branch& branch;
  const TileRows& rows;
  NarrowShared<C>& s;
  int64_t start;  // of the member's B, at the block's first rank
  int rank;
  bool is_whole;
  int column = 0;  // of the branch: the next chunk's first
  RowCopies<T> dy;
  FactorCopies<T, kTurns, kStep * C::kRankStride * sizeof(T), kStep> factor;

  __device__ __forceinline__ OperandCopies(const RowsParams& p, const Branch& branch,
                                           const TileRows& rows, int rank, NarrowShared<C>& s)
      : in(p.in),
        branch(branch),
        rows(rows),
        s(s),
        start(member_of_b(branch, rows.group) * branch.size * branch.R + rank),
        rank(rank),
        is_whole(branch.offset % 8 == 0 && branch.size % 8 == 0 && branch.R % 8 == 0),
        dy(static_cast<const T*>(p.in.dy) + rows.first * p.in.Dout + branch.offset, p.in.Dout,
           rows.count, branch.size, shared_address(s.ring)) {
    const int row = thread_index() / kAcross, own_rank = thread_index() % kAcross * 8;
    factor.left = branch.size - row;
    factor.to = shared_address(s.ring) + NarrowStage<C>::kFactor +
                sizeof(T) * (row * C::kRankStride + own_rank);
    const Parameter b = rank + own_rank < branch.R ? branch.b : Parameter{};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t at = start + static_cast<int64_t>(row + turn * kStep) * branch.R + own_rank;
      factor.set(turn, b, at, kChunk * branch.R, p.in.dy);
    }
  }

  __device__ __forceinline__ void fetch(uint32_t stage) {
    if (is_whole) {
      dy.bring(stage);
      factor.fetch(stage);
      return;
    }
    NarrowStage<C>& to = s.ring[stage / sizeof(NarrowStage<C>)];
    stage_elements(to);
    column += kChunk;
  }

  __device__ __forceinline__ void put(uint32_t stage) const {
    if (is_whole) factor.put(stage);
  }

 private:
  __device__ __forceinline__ void stage_elements(NarrowStage<C>& to) const {
    stage<T, kNarrowRows, kChunk>(
        to.x, kChunkStride, Parameter{in.dy, false},
        {rows.first * in.Dout + branch.offset + column, in.Dout, rows.count, branch.size - column});
    stage<T, kChunk, C::kRanks>(to.factor, C::kRankStride, branch.b,
                                {start + static_cast<int64_t>(column) * branch.R, branch.R,
                                 branch.size - column, branch.R - rank});
  }
};

// Grid: tiles of rows; rank blocks of all branches.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lora_linear_rows_sm80(const __grid_constant__ RowsParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<NarrowShared<C>>();
  const Linear& in = p.in;
  const TileRows rows = rows_of_tile<kNarrowRows>(p.tiling, block_index_x());
  // The branch whose rank block this is: those of the branches before it are passed over.
  int which = 0, block = block_index_y();
  while (block >= (in.branch[which].R + C::kRanks - 1) / C::kRanks) {
    block -= (in.branch[which++].R + C::kRanks - 1) / C::kRanks;
  }
  const Branch& branch = in.branch[which];
  const int rank = block * C::kRanks;
  // The reduction runs over the branch's own columns of dy. Columns beside them in the last chunk
  // come as zeros, so that a NaN there stays out.
  OperandCopies<C> copies(p, branch, rows, rank, s);
  multiply_narrow<Factor::kRowsOfB>(s, branch.size, copies);
  // Four neighbouring threads take a row: every fourth rank each.
  static_assert(kThreads == 4 * kNarrowRows, "each row has four threads");
  const int row = thread_index() / 4;
  float dot = 0.0f;
  if (row < rows.count) {
    const float factor = factor_of<T>(in, branch, rows.first + row);
    for (int r = thread_index() % 4; r < C::kRanks && rank + r < branch.R; r += 4) {
      const float raw = s.sums[0][row * C::kSumStride + r];
      const int64_t at = (rows.first + row) * in.ranks + branch.first + rank + r;
      // The dot takes raw before the gate: it is the gradient of scale g itself.
      dot += raw * to_float(static_cast<const T*>(p.in.s)[at]);
      static_cast<T*>(p.ds)[at] = round_to<T>(factor * raw);
    }
  }
  // All lanes come here, those of absent rows with 0: the shuffles below need every one.
  dot = group_sum<4>(dot);
  if (row < rows.count && thread_index() % 4 == 0) {
    // [rank blocks, B * S]: a block's rows are neighbours for the launch that sums over them.
    p.dots[static_cast<int64_t>(block_index_y()) * in.B * in.S + rows.first + row] = dot;
  }
}

using Configs = TypeList<NarrowConfig<bf16, 16>, NarrowConfig<bf16, 64>, NarrowConfig<f16, 16>,
                         NarrowConfig<f16, 64>>;

}  // namespace

// One number for all branches, that of the largest: the same configuration serves the launch.
int rank_block_of(const Linear& in) {
  int most = 0;
  for (int i = 0; i < in.branches; ++i) most = in.branch[i].R > most ? in.branch[i].R : most;
  return block_of(most);
}

void launch_rows_sm80(const RowsParams& p, Stream stream) {
  run_config(Configs{}, p.in.dtype, rank_block_of(p.in), [&](auto tag) {
    using C = typename decltype(tag)::type;
    // blocks_y: one for each rank block, counted as the kernel counts them
    LaunchShape shape{p.tiling.tiles, 0, 1, kThreads, sizeof(NarrowShared<C>)};
    for (int i = 0; i < p.in.branches; ++i) {
      shape.blocks_y += (p.in.branch[i].R + C::kRanks - 1) / C::kRanks;
    }
    launch<lora_linear_rows_sm80<C>>("lora_linear_rows_sm80", shape, stream, p);
  });
}

}  // namespace pelt::lora_linear
