// What both kernels of backward's first launch, the listed and the general one, do with rows: the
// gate's part of the gradients, and what they leave for the second launch.
#pragma once

#include "ops/gated_adapter/parts.cuh"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {

// da phi'(h). Where relu has no slope it lets nothing through, not even a NaN.
__device__ __forceinline__ float through_activation(Activation phi, float da, float h) {
  if (phi == Activation::kRelu) return h <= 0.0f ? 0.0f : da;
  return da * activation_derivative(phi, h);
}

// scale g of a row.
template <class T, class Options>
__device__ __forceinline__ float factor_of_row(const Call& in, int64_t row) {
  return scale_of<T>(in) * gate_of_row<T, Options>(in, in.output_as<float>(kGateValue), row);
}

// What the tile adds to the gradient of scale: y changes by dot times gate with it. By the first
// warp; the others go on.
template <class T, class Options>
__device__ __forceinline__ void leave_gated_dot(const BackwardParams& p, const float* dots,
                                                const TileRows& rows, int tile) {
  if (warp_index() != 0) return;
  float sum = 0.0f;
#pragma unroll 1  // twice at most
  for (int r = lane_index(); r < rows.count; r += 32) {
    sum +=
        dots[r] * gate_of_row<T, Options>(p.in, p.in.output_as<float>(kGateValue), rows.first + r);
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) *tile_sum(p, kGatedDot, tile) = sum;
}

// The tile's share of what its sentence's gate gets, by the first warp; the others go on.
__device__ __forceinline__ void publish_dots(const BackwardParams& p, const float* dots,
                                             const TileRows& rows, int tile) {
  if (warp_index() != 0) return;
  float sum = 0.0f, count = 0.0f;
#pragma unroll 1
  for (int r = lane_index(); r < rows.count; r += 32) {
    // Every row's output was scaled by the gate, also of those that do not count in it.
    sum += dots[r];
    count += counts(p.in, rows.first + r) ? 1.0f : 0.0f;
  }
  leave_sums(p.gate_partial, p.arrivals, rows, tile, sum, count);
}

// dlogit = d loss / d logit of each row, for a learned gate, in shared memory and for the second
// launch. gate_of(row of the tile): the row's own gate, of which a pooled one is the mean.
template <class T, class Options, class GateOf>
__device__ __forceinline__ void derive_logits(const BackwardParams& p, const TileRows& rows,
                                              int tile, const float* dots, const float (&pooled)[2],
                                              float* dlogits, GateOf&& gate_of) {
  const int r = thread_index();
  if (r < rows.count) {
    const int64_t row = rows.first + r;
    const float gate = gate_of(r);
    // The gradient of the row's gate, without scale. The sentence's gate, the mean over its rows
    // that count, has the sum of all dots.
    float share;
    if (Options::has_pooled_gate(p.in)) {
      share = counts(p.in, row) ? pooled[0] / pooled[1] : 0.0f;
    } else {
      share = dots[r];
    }
    const float dlogit = scale_of<T>(p.in) * share * gate * (1.0f - gate);
    dlogits[r] = dlogit;
    *row_scalar(p, kDLogit, row) = dlogit;
    if (p.a != nullptr) {
      store_16(static_cast<T*>(p.dlogit_parts) + row * kPartsStride, split_into_parts<T>(dlogit));
    }
  }
  sync_threads();  // dlogit is there
  if (warp_index() != 0) return;
  float sum = 0.0f;  // the tile's share of what the gate's bias gets
#pragma unroll 1
  for (int i = lane_index(); i < rows.count; i += 32) sum += dlogits[i];
  sum = warp_sum(sum);
  if (lane_index() == 0) *tile_sum(p, kDLogitSum, tile) = sum;
}

// dh of a tile of kRows from memory, where another tile has taken its place in shared memory; of
// rows and ranks that do not exist zeros.
template <class T, int kRows, int kStride>
__device__ __forceinline__ void reload_dh(const BackwardParams& p, const TileRows& rows,
                                          int vectors, int threads, T* tile) {
  const T* g_dh = static_cast<const T*>(p.dh) + rows.first * p.rank_stride;
#pragma unroll 1
  for (int i = thread_index(); i < kRows * vectors; i += threads) {
    const int row = i / vectors, rank = i % vectors * 8;
    Words4 words = {};
    if (row < rows.count && rank < p.rank_stride) {
      words = load_16(g_dh + row * static_cast<int64_t>(p.rank_stride) + rank);
    }
    store_16(tile + row * kStride + rank, words);
  }
  sync_threads();  // the tile is there
}

// The second launch's counters start from zero, and it learns how many blocks have left sums of the
// norms: those that have a tile.
__device__ __forceinline__ void prepare_second_launch(const BackwardParams& p, int threads) {
  const int64_t first = static_cast<int64_t>(block_index_x()) * threads + thread_index();
  if (p.tickets != nullptr) {
    const int64_t step = static_cast<int64_t>(grid_blocks_x()) * threads;
#pragma unroll 1
    for (int64_t i = first; i < weight_tiles_of(p); i += step) p.tickets[i] = 0;
  }
  if (first == 0) {
    *p.norm_slots = grid_blocks_x() < p.wave_tiles ? grid_blocks_x() : p.wave_tiles;
  }
}

}  // namespace pelt::gated_adapter
