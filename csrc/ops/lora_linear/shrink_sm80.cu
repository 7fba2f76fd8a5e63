// lora_linear, forward, first of two launches: everything that is a product with x.
//
//   s = dropout(x) [A_0; A_1; ...]^T    [B * S, ΣR]
//   g = sigmoid(x [w_0; w_1; ...]^T + b), pooled over the sentence
//
// A block takes 32 rows of x and 16, 32 or 64 columns of [A; w] (see narrow.cuh), so where the ranks
// and gates are no more than that x is read once. The gates' columns do not straddle two blocks;
// beside dropout they have a block of their own, because they see x as it is.
//
// A pooled gate: each tile leaves the sum of its rows' gates, and the block that draws a sentence's
// last ticket adds the tiles in their order and divides. No block waits for another, so the launch
// is an ordinary one. Backward launches this kernel again for the rows' gates alone.
//
// Shared memory per block, columns 16, 32, 64: 38, 49, 70 KB.
#include "ops/lora_linear/narrow.cuh"

namespace pelt::lora_linear {
namespace {

// Which row of A, or which gate's weight, each of the block's columns is a product with.
template <class C>
__device__ __forceinline__ void find_sources(const ShrinkParams& p, NarrowShared<C>& s,
                                             const TileRows& rows, int first) {
  for (int i = thread_index(); i < C::kRanks; i += kThreads) {
    const int column = first + i, gate = column - p.gate_column;
    Source source = {};  // between the ranks and the gates, and behind them: zeros
    if (gate >= 0 && gate < p.in.gates) {
      source = {p.in.gate[gate].weight, 0};
    } else if (!p.is_for_backward() && column < p.in.ranks) {
      source = rank_row(p.in, column, rows.group);
    }
    s.source[i] = source;
  }
}

// The operands' chunks: x, or dropout(x), and the sources' rows.
template <class C>
struct ShrinkCopies {
  using T = typename C::T;
  using Rows = RowCopies<T>;
  static constexpr int kStep = kThreads / kVectors;  // rows of the factor a turn
  static constexpr int kTurns = C::kRanks / kStep;

  const Linear& in;
  Rows x;
  FactorCopies<T, kTurns, kStep * kChunkStride * sizeof(T), 0> factor;
  bool is_dropped;
  int64_t row;                // of x, of the thread's first vector
  Words4 held[Rows::kTurns];  // of x, to be dropped

  __device__ __forceinline__ ShrinkCopies(const ShrinkParams& p, const NarrowShared<C>& s,
                                          const TileRows& rows, bool is_dropped)
      : in(p.in),
        x(static_cast<const T*>(p.in.x) + rows.first * p.in.Din, p.in.Din, rows.count, p.in.Din,
          shared_address(s.ring)),
        is_dropped(is_dropped) {
    const int own = thread_index() / kVectors, column = thread_index() % kVectors * 8;
    row = rows.first + own;
    factor.left = p.in.Din - column;
    factor.to = shared_address(s.ring) + NarrowStage<C>::kFactor +
                sizeof(T) * (own * kChunkStride + column);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const Source& source = s.source[own + turn * kStep];
      factor.set(turn, source.row, source.offset + column, kChunk, p.in.x);
    }
  }

  __device__ __forceinline__ void fetch(uint32_t stage) {
    factor.fetch(stage);
    if (!is_dropped) {
      x.bring(stage);
      return;
    }
#pragma unroll
    for (int turn = 0; turn < Rows::kTurns; ++turn) {
      held[turn] = x.left > 0 ? load_global_16(x.from[turn]) : Words4{};
      x.from[turn] += kChunk;
    }
    x.left -= kChunk;
  }

  // Dropped before the product and rounded like any x: backward drops and rounds in the same way.
  __device__ __forceinline__ void put(uint32_t stage) const {
    factor.put(stage);
    if (!is_dropped) return;
    // The vector of the chunk that fetch() has just passed.
    const int column = in.Din - x.left - kChunk;
#pragma unroll
    for (int turn = 0; turn < Rows::kTurns; ++turn) {
      Float8 values = widen<T>(held[turn]);
      const int64_t element = (row + turn * Rows::kStep) * in.Din + column;
      const Float8 factors = dropout_of(in.dropout, element);
      for (int e = 0; e < 8; ++e) values.v[e] *= factors.v[e];
      store_shared_16(x.to + stage + turn * Rows::kStepBytes, narrow<T>(values));
    }
  }
};

// s is rounded here: backward reads it from memory, so forward's second launch does, too.
template <class C>
__device__ __forceinline__ void store_s(const ShrinkParams& p, const NarrowShared<C>& s,
                                        const TileRows& rows, int first) {
  using T = typename C::T;
  constexpr int kAcross = C::kRanks / 8;
  for (int i = thread_index(); i < kNarrowRows * kAcross; i += kThreads) {
    const int row = i / kAcross, column = i % kAcross * 8;
    // Behind the ranks the block may hold gates, which are not part of s.
    const int left = p.in.ranks - first - column;
    if (row >= rows.count || left <= 0) continue;
    Float8 values;
    // Gates behind the ranks are not even read: activate_gates writes them.
    for (int e = 0; e < 8; ++e) {
      values.v[e] = e < left ? s.sums[0][row * C::kSumStride + column + e] : 0.0f;
    }
    store_ranks<T>(p.in.s, (rows.first + row) * p.in.ranks + first + column, left < 8 ? left : 8,
                   values);
  }
}

// The rows' gates in place of their logits; into memory goes what is a result already: every row's
// gate for backward, a token gate for forward. `column` is the gates' first in the block.
template <class C>
__device__ __forceinline__ void activate_gates(const ShrinkParams& p, NarrowShared<C>& s,
                                               const TileRows& rows, int column) {
  using T = typename C::T;
  const int64_t all = static_cast<int64_t>(p.in.B) * p.in.S;
  for (int i = thread_index(); i < kNarrowRows * p.in.gates; i += kThreads) {
    // Neighbouring threads take neighbouring rows, which are neighbours in memory.
    const int g = i / kNarrowRows, row = i % kNarrowRows;
    const Gate& gate = p.in.gate[g];
    float& at = s.sums[0][row * C::kSumStride + column + g];
    const float value = sigmoid(at + load_parameter<T>(gate.bias, 0));
    at = value;
    if (row >= rows.count) continue;
    if (p.is_for_backward()) {
      p.row_gates[g * all + rows.first + row] = value;
    } else if (gate.pooling == Pooling::kToken) {
      gate.value[rows.first + row] = value;
    }
  }
  // pool_gates sums over rows that other threads have activated.
  sync_threads();
}

// The tile's sums over rows, and by the block that comes last the sentence's gates.
template <class C>
__device__ __forceinline__ void pool_gates(const ShrinkParams& p, NarrowShared<C>& s,
                                           const TileRows& rows, int tile, int column) {
  // A thread has a gate, one thread more counts the rows that the mask leaves.
  const int g = thread_index(), width = p.in.gates + 1;
  const bool is_gate = g < p.in.gates;
  if (g < width) {
    float sum = 0.0f;
    for (int row = 0; row < rows.count; ++row) {
      const bool is_real = p.in.mask == nullptr || p.in.mask[rows.first + row];
      const bool counts = is_real || (is_gate && p.in.gate[g].pooling != Pooling::kMaskedMean);
      if (counts) sum += is_gate ? s.sums[0][row * C::kSumStride + column + g] : 1.0f;
    }
    p.gate_partial[static_cast<int64_t>(tile) * width + g] = sum;
  }
  // The ticket releases the block's partial sums: all of them must have been written.
  sync_threads();
  if (thread_index() == 0) {
    s.is_last = take_ticket(p.tickets + rows.group) == p.tiling.tiles_per_group - 1;
  }
  // Every thread learns whether the block came last, and then sees the other tiles' sums.
  sync_threads();
  if (!s.is_last || !is_gate || p.in.gate[g].pooling == Pooling::kToken) return;
  // In the tiles' order, whichever block this is: two runs give the same bits.
  float sum = 0.0f, count = 0.0f;
  for (int i = 0; i < p.tiling.tiles_per_group; ++i) {
    const int64_t of_tile = static_cast<int64_t>(rows.group) * p.tiling.tiles_per_group + i;
    sum += p.gate_partial[of_tile * width + g];
    count += p.gate_partial[of_tile * width + p.in.gates];
  }
  if (p.in.gate[g].pooling == Pooling::kMean) count = static_cast<float>(p.in.S);
  p.in.gate[g].value[rows.group] = sum / fmaxf(count, 1.0f);  // a sentence without a row has 0
}

// Grid: tiles of rows; blocks of columns, from p.gate_column on if only gates are wanted.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lora_linear_shrink_sm80(const __grid_constant__ ShrinkParams p) {
  auto& s = shared_memory_as<NarrowShared<C>>();
  const TileRows rows = rows_of_tile<kNarrowRows>(p.tiling, block_index_x());
  // Where only gates are wanted, in backward, the blocks of ranks before theirs are not launched.
  const int skipped = p.is_for_backward() ? p.gate_column / C::kRanks : 0;
  const int first = (skipped + block_index_y()) * C::kRanks;
  // Blocks of ranks see dropout(x), the gates' block behind them x.
  const bool is_dropped = p.in.dropout.is_active() && first < p.gate_column;
  find_sources(p, s, rows, first);
  // All threads look up where their rows of the factor lie.
  sync_threads();
  ShrinkCopies<C> copies(p, s, rows, is_dropped);
  multiply_narrow<Factor::kRowsOfA>(s, p.in.Din, copies);
  if (!p.is_for_backward() && first < p.in.ranks) store_s(p, s, rows, first);
  // Only the block that holds the gates' columns goes on.
  if (p.in.gates == 0 || first != p.gate_column / C::kRanks * C::kRanks) return;
  activate_gates(p, s, rows, p.gate_column - first);
  if (p.gate_partial != nullptr) {
    pool_gates(p, s, rows, block_index_x(), p.gate_column - first);
  }
}

}  // namespace

namespace {

// Columns of a block for so many. 32 beside the sizes of other launches: a branch of 16 ranks and its
// gate are usual.
constexpr int shrink_block_of(int columns) {
  return columns > 16 && columns <= 32 ? 32 : block_of(columns);
}

using ShrinkConfigs =
    TypeList<NarrowConfig<bf16, 16>, NarrowConfig<bf16, 32>, NarrowConfig<bf16, 64>,
             NarrowConfig<f16, 16>, NarrowConfig<f16, 32>, NarrowConfig<f16, 64>>;

}  // namespace

// The gates stand beside the ranks where one block has room for both, and otherwise, or where
// dropout makes x another for the ranks, at the beginning of the next block.
int gate_column_of(const Linear& in) {
  const int block = in.dropout.is_active() ? 64 : shrink_block_of(in.ranks + in.gates);
  const bool straddles = in.ranks % block + in.gates > block;
  const bool is_apart = in.gates > 0 && (straddles || in.dropout.is_active());
  return is_apart ? (in.ranks + block - 1) / block * block : in.ranks;
}

void launch_shrink_sm80(const ShrinkParams& params, Stream stream) {
  ShrinkParams p = params;
  p.gate_column = gate_column_of(p.in);
  const int columns = shrink_block_of(p.gate_column + p.in.gates);
  // Behind the last column that holds something.
  const int end = p.in.gates > 0 ? p.gate_column + p.in.gates : p.in.ranks;
  const int skipped = p.is_for_backward() ? p.gate_column / columns : 0;
  run_config(ShrinkConfigs{}, p.in.dtype, columns, [&](auto tag) {
    using C = typename decltype(tag)::type;
    const int blocks_y = (end + columns - 1) / columns - skipped;
    const LaunchShape shape{p.tiling.tiles, blocks_y, 1, kThreads, sizeof(NarrowShared<C>)};
    launch<lora_linear_shrink_sm80<C>>("lora_linear_shrink_sm80", shape, stream, p);
  });
}

}  // namespace pelt::lora_linear
