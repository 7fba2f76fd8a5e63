// lora_linear, forward in one launch (see single.cuh):
//
//   y = x W^T + b + Σ_i scale_i g_i (dropout(x) A_i^T) B_i^T
//
// Learned gates of single tokens are further columns beside the ranks: a row's gate is known when
// its ranks are. s is stored by the first block of columns that a branch reaches, gates likewise.
//
// Shared memory per block, ranks 16, 64: 75, 100 KB; 256, 64 columns: 113, 58 KB.
#include "ops/lora_linear/single.cuh"

namespace pelt::lora_linear {
namespace {

// Is this the first block of columns that the branch reaches.
template <class C>
__device__ __forceinline__ bool is_first_of(const SingleShared<C>& s, const Branch& branch) {
  return branch.offset / C::kColumns * C::kColumns == s.first;
}

// The gates of the warp's own rows in place of their logits. Into memory go those that this block
// is the first to know: every gate is then written once.
template <class C>
__device__ __forceinline__ void activate_gates(const SingleForwardParams& p,
                                               const SingleShared<C>& s, const SingleWarp<C>& warp,
                                               float* sums) {
  using T = typename C::T;
  for (int i = lane_index(); i < C::kOwnRows * p.in.gates; i += 32) {
    const int row = i % C::kOwnRows, g = i / C::kOwnRows;
    const Gate& gate = p.in.gate[g];
    // The logit stands behind the ranks of its row: the same product made both.
    float& at = sums[row * C::kSumStride + s.gate_column + g];
    const float value = sigmoid(at + load_parameter<T>(gate.bias, 0));
    at = value;
    const bool is_ours =
        gate.branch < 0 ? s.first == 0 : is_first_of<C>(s, p.in.branch[gate.branch]);
    if (!is_ours || warp.own_row + row >= s.rows.count) continue;
    gate.value[s.rows.first + warp.own_row + row] = value;
  }
  // finish_ranks reads gates that other lanes have activated.
  sync_warp();
}

// scale g s, rounded, into shared memory for the product with B; and s, rounded, into global
// memory. In the composed form B meets s after both roundings, here after the second alone.
template <class C>
__device__ __forceinline__ void finish_ranks(const SingleForwardParams& p, SingleShared<C>& s,
                                             const SingleWarp<C>& warp,
                                             const SingleSums<C>& registers) {
  using T = typename C::T;
  const Linear& in = p.in;
  float* sums = spread_sums<C>(s, warp, registers);
  if (needs_gates(in, s.first, s.first + C::kColumns)) activate_gates<C>(p, s, warp, sums);
  // Fragments of x were dropped but not scaled (fragment_dropout.cuh).
  const float kept_scale = in.dropout.is_active() ? in.dropout.keep_scale : 1.0f;
  for (int i = lane_index(); i < C::kOwnRows * C::kRanks / 8; i += 32) {
    // A lane has eight neighbouring ranks of a row, which are of one branch: a slot has sixteen.
    const int row = i / (C::kRanks / 8), vector = i % (C::kRanks / 8);
    if (vector * 8 / kSlot >= s.slots) continue;
    const SingleSlot& slot = s.slot[vector * 8 / kSlot];
    const Branch& branch = in.branch[slot.branch];
    const int rank = slot.rank + vector * 8 % kSlot, left = slot.R - rank;
    const bool is_there = warp.own_row + row < s.rows.count;
    Float8 values = {};
    for (int e = 0; e < 8; ++e) {
      // Beyond the ranks there may be gates.
      if (e < left) values.v[e] = kept_scale * sums[row * C::kSumStride + 8 * vector + e];
    }
    if (is_there) {
      const int64_t global_row = s.rows.first + warp.own_row + row;
      // Every block that the branch reaches knows its s; the first one stores it.
      if (left > 0 && is_first_of<C>(s, branch)) {
        store_ranks<T>(p.in.s, global_row * in.ranks + branch.first + rank, left < 8 ? left : 8,
                       values);
      }
      // As factor_of() does, but a learned gate is not in memory yet.
      float gate = 1.0f;
      if (branch.learned_gate >= 0) {
        gate = sums[row * C::kSumStride + s.gate_column + branch.learned_gate];
      } else if (branch.gate.data != nullptr) {
        gate = load_parameter<T>(
            branch.gate, branch.has_gate_per_row ? global_row : sentence_of(in, global_row));
      }
      for (int e = 0; e < 8; ++e) values.v[e] *= branch.scale * gate;
    }
    store_16(s.tail.ranks + (warp.own_row + row) * C::kRankStride + 8 * vector, narrow<T>(values));
  }
}

// Grid: tiles of rows and columns (see place_block).
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    lora_linear_single_fwd_sm80(const __grid_constant__ SingleForwardParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<SingleShared<C>>();
  SingleSums<C> sums;
  multiply<C>(p, s, sums);  // x W^T, x A^T and the gates' logits
  const SingleWarp<C> warp;
  if (s.used > 0) {
    finish_ranks<C>(p, s, warp, sums);
    // The product with B reads the ranks of the warp's rows, of which other warps have written some.
    sync_threads();
    multiply_up<C>(p, s, warp, sums);
  }
  // The bias is added in float32, so that y is rounded once.
  store_out<C>(p, s, warp, sums, [&](int column) {
    const bool is_there = p.bias.data != nullptr && column < p.columns;
    return is_there ? load_parameter<T>(p.bias, column) : 0.0f;
  });
}

}  // namespace

// The same for both dtypes and, but for the larger Q of forward, both directions.
size_t single_shared_bytes(int ranks, int columns) {
  if (columns == kSingleSmallColumns)
    return sizeof(SingleShared<SingleConfig<bf16, true, true, 16, kSingleSmallColumns>>);
  if (columns == kSingleWideColumns)
    return sizeof(SingleShared<SingleConfig<bf16, true, true, 16, kSingleWideColumns>>);
  return ranks <= 16 ? sizeof(SingleShared<SingleConfig<bf16, true, true, 16, kSingleColumns>>)
                     : sizeof(SingleShared<SingleConfig<bf16, true, true, 64, kSingleColumns>>);
}

void launch_single_fwd_sm80(const SingleForwardParams& p, bool is_transposed, Stream stream) {
  const int ranks = single_forward_ranks(p.in, p.tile_columns);
  run_single(
      SingleConfigs<true>{}, p, !is_transposed, ranks, [&](auto tag, const LaunchShape& shape) {
        using C = typename decltype(tag)::type;
        launch<lora_linear_single_fwd_sm80<C>>("lora_linear_single_fwd_sm80", shape, stream, p);
      });
}

}  // namespace pelt::lora_linear
