// lora_linear, backward of x in one launch (see single.cuh):
//
//   dx = dy W + dropout(Σ_i ds_i A_i)       ds_i = scale_i g_i dy[:, columns_i] B_i
//
// The first block of columns also stores ds, which the sums for A wait for, and each row's
// <dy B, s>, of which the gates' gradients are sums.
//
// Shared memory per block, ranks 16, 64: 73, 99 KB; 256, 64 columns: 109, 57 KB.
#include "ops/lora_linear/single.cuh"

namespace pelt::lora_linear {
namespace {

// Each row's <dy B_i, s_i>. What is in shared memory is dy B. A row has one lane, or two, which take
// the branches in turn.
template <class C>
__device__ __forceinline__ void store_dots(const SingleBackwardParams& p, const SingleShared<C>& s,
                                           const SingleWarp<C>& warp, const float* sums) {
  using T = typename C::T;
  const Linear& in = p.in;
  constexpr int kLanes = 32 / C::kOwnRows;  // of a row
  const int row = lane_index() % C::kOwnRows;
  const int64_t global_row = s.rows.first + warp.own_row + row;
  if (warp.own_row + row >= s.rows.count) return;
  int slots = 0;  // of the branches before this one: where its ranks begin
  for (int i = 0; i < in.branches; ++i) {
    const Branch& branch = in.branch[i];
    if (i % kLanes == lane_index() / C::kOwnRows) {
      const T* of_row = static_cast<const T*>(p.in.s) + global_row * in.ranks + branch.first;
      float dot = 0.0f;
      // Before the gate is applied: the dot is the gradient of scale g itself.
      for (int r = 0; r < branch.R; ++r) {
        dot += sums[row * C::kSumStride + slots * kSlot + r] * to_float(of_row[r]);
      }
      p.dots[static_cast<int64_t>(i) * in.B * in.S + global_row] = dot;
    }
    slots += (branch.R + kSlot - 1) / kSlot;
  }
}

// ds = scale g dy B, rounded, into shared memory for the product with A and into global memory for
// the sums of dA.
template <class C>
__device__ __forceinline__ void finish_ranks(const SingleBackwardParams& p, SingleShared<C>& s,
                                             const SingleWarp<C>& warp,
                                             const SingleSums<C>& registers) {
  using T = typename C::T;
  const Linear& in = p.in;
  const float* sums = spread_sums<C>(s, warp, registers);
  // All blocks of a row's columns know its ds; the first one stores what others launches read.
  if (s.first == 0 && p.dots != nullptr) store_dots<C>(p, s, warp, sums);
  for (int i = lane_index(); i < C::kOwnRows * C::kRanks / 8; i += 32) {
    // A lane has eight neighbouring ranks of a row, which are of one branch: a slot has sixteen.
    const int row = i / (C::kRanks / 8), vector = i % (C::kRanks / 8);
    if (vector * 8 / kSlot >= s.slots) continue;
    const SingleSlot& slot = s.slot[vector * 8 / kSlot];
    const Branch& branch = in.branch[slot.branch];
    const int rank = slot.rank + vector * 8 % kSlot, left = slot.R - rank;
    Float8 values = {};  // zeros also for rows and ranks that do not exist: they are multiplied
    if (warp.own_row + row < s.rows.count) {
      const int64_t global_row = s.rows.first + warp.own_row + row;
      const float factor = factor_of<T>(in, branch, global_row);
      for (int e = 0; e < 8; ++e) {
        if (e < left) values.v[e] = factor * sums[row * C::kSumStride + 8 * vector + e];
      }
      if (left > 0 && s.first == 0) {
        store_ranks<T>(p.ds, global_row * in.ranks + branch.first + rank, left < 8 ? left : 8,
                       values);
      }
    }
    store_16(s.tail.ranks + (warp.own_row + row) * C::kRankStride + 8 * vector, narrow<T>(values));
  }
}

// Grid: tiles of rows and columns (see place_block).
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    lora_linear_single_bwd_sm80(const __grid_constant__ SingleBackwardParams p) {
  auto& s = shared_memory_as<SingleShared<C>>();
  SingleSums<C> sums;
  multiply<C>(p, s, sums);  // dy W and dy B
  const SingleWarp<C> warp;
  if (s.slots > 0) {
    finish_ranks<C>(p, s, warp, sums);
    // The product with A reads the ranks of the warp's rows, of which other warps have written some.
    sync_threads();
    multiply_up<C>(p, s, warp, sums);
  }
  store_out<C>(p, s, warp, sums, [](int) { return 0.0f; });
}

}  // namespace

void launch_single_bwd_sm80(const SingleBackwardParams& p, bool is_transposed, Stream stream) {
  run_single(SingleConfigs<false>{}, p, is_transposed, single_backward_ranks(p.in),
             [&](auto tag, const LaunchShape& shape) {
               using C = typename decltype(tag)::type;
               launch<lora_linear_single_bwd_sm80<C>>("lora_linear_single_bwd_sm80", shape, stream,
                                                      p);
             });
}

}  // namespace pelt::lora_linear
