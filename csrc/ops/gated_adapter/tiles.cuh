// What the kernels have to know of a row before its products: statistics, the gate, and x as the
// products take it.
#pragma once

#include "cuda/rows.cuh"
#include "ops/gated_adapter/options.h"

namespace pelt::gated_adapter {

// Which members of the banks serve a tile.
__device__ __forceinline__ int64_t down_member_of(const Call& in, const TileRows& rows) {
  return member_of(in.input_as<int64_t>(kDownIndex), has_down_index_per_sample(in), rows.group,
                   in.M);
}

__device__ __forceinline__ int64_t up_member_of(const Call& in, const TileRows& rows) {
  return member_of(in.input_as<int64_t>(kUpIndex), has_up_index_per_sample(in), rows.group,
                   in.M_up);
}

// What is known of each row of a tile, in shared memory.
struct RowState {
  float mean[kBlockT];  // of x, with a pre-norm
  float rstd[kBlockT];
  float logit[kBlockT];   // w . x + b of a learned gate
  float factor[kBlockT];  // scale g
};

// Mean and deviation of x for a pre-norm, and the gate's logit where it is no extra row of the down
// projection: the one extra read of x. A warp takes a row, so that its loads are coalesced. The
// caller has a barrier behind it.
template <class Options, class T>
__device__ __forceinline__ void measure_rows(const Call& in, const TileRows& rows, RowState& state,
                                             bool wants_logit) {
  const T* g_x = in.input_as<T>(kX);  // [B * S, D]
  for (int r = warp_index(); r < kBlockT; r += kWarps) {
    Moments moments;
    float dot = 0.0f;
    if (r < rows.count) {
      for (int d = lane_index() * 8; d < in.D; d += 32 * 8) {
        const Float8 x = load_8(g_x + (rows.first + r) * in.D + d);
        if (Options::has_pre_norm(in)) moments.merge(Moments::of(x.v));
        if (!wants_logit) continue;
        const Float8 w = load_parameter_8<T>(in.parameter(kGateWeight), d);
        // Rounded as in the product that computes the logit elsewhere: forward and backward have
        // the same gate.
        for (int e = 0; e < 8; ++e) dot += x.v[e] * to_float(round_to<T>(w.v[e]));
      }
    }
    // All lanes take part, also for rows that are not there.
    moments = group_moments<32>(moments);
    dot = warp_sum(dot);
    if (lane_index() != 0) continue;
    state.mean[r] = moments.mean;
    // 0 makes zeros of a row that is not there.
    state.rstd[r] = r < rows.count ? moments.reciprocal_deviation(in.pre_norm_eps) : 0.0f;
    if (wants_logit) state.logit[r] = dot + load_parameter<T>(in.parameter(kGateBias), 0);
  }
}

// A chunk of pre_norm(x) [kBlockT, kChunk] from column `first` on; rows that are not there are
// zero.
template <class Options, class T>
__device__ __forceinline__ void stage_x(T* tile, const Call& in, const TileRows& rows,
                                        const RowState& state, int first) {
  const T* g_x = in.input_as<T>(kX);  // [B * S, D]
  for (int i = thread_index(); i < kBlockT * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * 8;
    const bool is_there = row < rows.count && first + column < in.D;
    const T* from = g_x + (is_there ? (rows.first + row) * in.D + first + column : 0);
    T* to = tile + row * kChunkStride + column;
    if (!Options::has_pre_norm(in)) {
      cp_async_16(to, from, is_there);
      continue;
    }
    // What has to be computed comes through registers.
    Float8 x = {};
    if (is_there) {
      x = load_8(from);
      const Float8 weight = load_parameter_8<T>(in.parameter(kPreNormWeight), first + column);
      const Float8 bias = load_parameter_8<T>(in.parameter(kPreNormBias), first + column);
      for (int e = 0; e < 8; ++e) {
        x.v[e] = (x.v[e] - state.mean[row]) * state.rstd[row] * weight.v[e] + bias.v[e];
      }
    }
    store_16(to, narrow<T>(x));
  }
}

// scale lambda without the gate.
template <class T>
__device__ __forceinline__ float scale_of(const Call& in) {
  return in.scale_value *
         (in.input[kScale] == nullptr ? 1.0f : load_parameter<T>(in.parameter(kScale), 0));
}

// The gate of a row that was given, or that forward has computed; 1 without one.
template <class T, class Options = General>
__device__ __forceinline__ float gate_of_row(const Call& in, const float* gate_value, int64_t row) {
  if (Options::has_learned_gate(in)) {
    return gate_value[in.pooling == Pooling::kToken ? row : row / in.S];
  }
  if (in.input[kGate] == nullptr) return 1.0f;
  return load_parameter<T>(in.parameter(kGate), has_gate_per_row(in) ? row : row / in.S);
}

// Does a row count in its sentence's pooled gate.
__device__ __forceinline__ bool counts(const Call& in, int64_t row) {
  return in.pooling == Pooling::kMean || in.input_as<bool>(kMask)[row];
}

// The dropout factors of eight neighbouring elements of row `row` from column `column` on.
__device__ __forceinline__ Float8 dropout_of_row(const Call& in, int64_t row, int column) {
  return dropout_of(in.dropout, row * in.D + column);
}

}  // namespace pelt::gated_adapter
