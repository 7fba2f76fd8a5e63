// lora_linear, forward, first of two launches: everything that is a product with x.
//
//   s = dropout(x) [A_0; A_1; ...]^T    [B * S, ΣR]
//   g = sigmoid(x [w_0; w_1; ...]^T + b), pooled over the sentence
//
// A block takes 32 rows of x and 16 or 64 columns of [A; w] (see narrow.cuh), so where the ranks
// and gates are no more than that x is read once. The gates' columns do not straddle two blocks;
// beside dropout they have a block of their own, because they see x as it is.
//
// A pooled gate: each tile leaves the sum of its rows' gates, and the block that draws a sentence's
// last ticket adds the tiles in their order and divides. Nobody waits for anybody, so the launch is
// an ordinary one. Backward launches this kernel again for the rows' gates alone.
//
// Shared memory per block, columns 16, 64: 38, 70 KB.
#include "common/type_list.h"
#include "ops/lora_linear/narrow.cuh"

namespace pelt::lora_linear {
namespace {

template <class C>
__device__ __forceinline__ void find_sources(const ShrinkParams& p, NarrowShared<C>& s,
                                             const TileRows& rows, int first) {
  for (int i = thread_index(); i < C::kColumns; i += kThreads) {
    const int column = first + i, gate = column - p.gate_column;
    Source source = {};
    if (gate >= 0 && gate < p.in.gates) {
      source = {p.in.gate[gate].gate_weight, 0};
    } else if (p.s != nullptr && column < p.in.ranks) {
      source = rank_row(p.in, column, rows.group);
    }
    s.source[i] = source;
  }
}

template <class C>
__device__ __forceinline__ void store_s(const ShrinkParams& p, const NarrowShared<C>& s,
                                        const TileRows& rows, int first) {
  using T = typename C::T;
  for (int i = thread_index(); i < kNarrowRows * C::kColumns; i += kThreads) {
    const int row = i / C::kColumns, column = i % C::kColumns;
    if (row >= rows.count || first + column >= p.in.ranks) continue;
    static_cast<T*>(p.s)[(rows.first + row) * p.in.ranks + first + column] =
        round_to<T>(s.sums[0][row * C::kSumStride + column]);
  }
}

// The rows' gates, into memory and in place of their logits.
template <class C>
__device__ __forceinline__ void open_gates(const ShrinkParams& p, NarrowShared<C>& s,
                                           const TileRows& rows, int column) {
  using T = typename C::T;
  const int64_t all = static_cast<int64_t>(p.in.B) * p.in.S;
  for (int i = thread_index(); i < kNarrowRows * p.in.gates; i += kThreads) {
    const int gate = i / kNarrowRows, row = i % kNarrowRows;
    float& at = s.sums[0][row * C::kSumStride + column + gate];
    const float value = sigmoid(at + load_parameter<T>(p.in.gate[gate].gate_bias, 0));
    at = value;
    if (row >= rows.count) continue;
    if (p.row_gates != nullptr) p.row_gates[gate * all + rows.first + row] = value;
    if (p.gate_value[gate] != nullptr && p.in.gate[gate].pooling == Pooling::kToken) {
      p.gate_value[gate][rows.first + row] = value;
    }
  }
  sync_threads();
}

// The tile's sums over rows, and by the block that comes last the sentence's gates.
template <class C>
__device__ __forceinline__ void pool_gates(const ShrinkParams& p, NarrowShared<C>& s,
                                           const TileRows& rows, int tile, int column) {
  const int gate = thread_index(), width = p.in.gates + 1;
  if (gate < width) {
    float sum = 0.0f;
    for (int row = 0; row < rows.count; ++row) {
      const bool is_real = p.in.mask == nullptr || p.in.mask[rows.first + row];
      const bool counts =
          is_real || (gate < p.in.gates && p.in.gate[gate].pooling != Pooling::kMaskedMean);
      if (counts) sum += gate < p.in.gates ? s.sums[0][row * C::kSumStride + column + gate] : 1.0f;
    }
    p.gate_partial[static_cast<int64_t>(tile) * width + gate] = sum;
  }
  sync_threads();
  if (thread_index() == 0) {
    s.is_last = take_ticket(p.tickets + rows.group) == p.tiling.tiles_per_group - 1;
  }
  sync_threads();
  if (!s.is_last || gate >= p.in.gates || p.gate_value[gate] == nullptr) return;
  if (p.in.gate[gate].pooling == Pooling::kToken) return;
  float sum = 0.0f, count = 0.0f;
  for (int i = 0; i < p.tiling.tiles_per_group; ++i) {
    const int64_t of_tile = static_cast<int64_t>(rows.group) * p.tiling.tiles_per_group + i;
    sum += p.gate_partial[of_tile * width + gate];
    count += p.gate_partial[of_tile * width + p.in.gates];
  }
  if (p.in.gate[gate].pooling == Pooling::kMean) count = static_cast<float>(p.in.S);
  p.gate_value[gate][rows.group] = sum / fmaxf(count, 1.0f);
}

// Grid: tiles of rows; blocks of columns, from p.gate_column on if only gates are wanted.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lora_linear_shrink_sm80(const __grid_constant__ ShrinkParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<NarrowShared<C>>();
  const TileRows rows = rows_of_tile<kNarrowRows>(p.tiling, block_index_x());
  const int skipped = p.s == nullptr ? p.gate_column / C::kColumns : 0;
  const int first = (skipped + block_index_y()) * C::kColumns;
  const bool is_dropped = p.in.dropout.is_active() && first < p.gate_column;
  find_sources(p, s, rows, first);
  sync_threads();
  multiply_narrow<Factor::kRowsOfA, C>(s, p.in.Din, [&](int stage, int column) {
    stage_x<T, kNarrowRows>(s.ring.x[stage], p.in, rows, column, is_dropped);
    stage_sources<T, C::kColumns>(s.ring.factor[stage], p.in, s.source, column);
  });
  if (p.s != nullptr && first < p.in.ranks) store_s(p, s, rows, first);
  if (p.in.gates == 0 || first != p.gate_column / C::kColumns * C::kColumns) return;
  open_gates(p, s, rows, p.gate_column - first);
  if (p.gate_partial != nullptr) {
    pool_gates(p, s, rows, block_index_x(), p.gate_column - first);
  }
}

using Configs = TypeList<NarrowConfig<bf16, 16>, NarrowConfig<bf16, 64>, NarrowConfig<f16, 16>,
                         NarrowConfig<f16, 64>>;

// Columns of a block.
int columns_of(const Inputs& in) { return gate_column_of(in) + in.gates <= 16 ? 16 : 64; }

}  // namespace

int gate_column_of(const Inputs& in) {
  const int block = in.ranks + in.gates <= 16 && !in.dropout.is_active() ? 16 : 64;
  const bool straddles = in.ranks % block + in.gates > block;
  const bool is_apart = in.gates > 0 && (straddles || in.dropout.is_active());
  return is_apart ? (in.ranks + block - 1) / block * block : in.ranks;
}

void launch_shrink_sm80(const ShrinkParams& params, Stream stream) {
  ShrinkParams p = params;
  p.gate_column = gate_column_of(p.in);
  const int columns = columns_of(p.in),
            end = p.in.gates > 0 ? p.gate_column + p.in.gates : p.in.ranks;
  const int skipped = p.s == nullptr ? p.gate_column / columns : 0;
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && C::kColumns == columns;
      },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        LaunchShape shape;
        shape.threads = kThreads;
        shape.shared_bytes = sizeof(NarrowShared<C>);
        shape.blocks_x = p.tiling.tiles;
        shape.blocks_y = (end + columns - 1) / columns - skipped;
        launch<lora_linear_shrink_sm80<C>>("lora_linear_shrink_sm80", shape, stream, p);
      });
  check(found, "lora_linear_shrink_sm80: expected bfloat16 or float16, got ", name_of(p.in.dtype));
}

}  // namespace pelt::lora_linear
