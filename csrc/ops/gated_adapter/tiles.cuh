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

// A chunk of pre_norm(x) [kBlockT, kChunk] from column `first` on, by the norm of a member of its
// bank; rows that are not there are zero.
template <class Options, class T>
__device__ __forceinline__ void stage_x(T* tile, const Call& in, const TileRows& rows,
                                        const RowState& state, int64_t member, int first) {
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
      const int64_t at = pre_norm_at(in, member) + first + column;
      const Float8 weight = load_parameter_8<T>(in.parameter(kPreNormWeight), at);
      const Float8 bias = load_parameter_8<T>(in.parameter(kPreNormBias), at);
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

// why_not lets rows be counted in 32 bits, in which a division is short.
__device__ __forceinline__ int sample_of(const Call& in, int64_t row) {
  return static_cast<int>(row) / in.S;
}

// The gate of a row that was given, or that forward has computed; 1 without one.
template <class T, class Options = General>
__device__ __forceinline__ float gate_of_row(const Call& in, const float* gate_value, int64_t row) {
  if (Options::has_learned_gate(in)) {
    return gate_value[in.pooling == Pooling::kToken ? row : sample_of(in, row)];
  }
  if (in.input[kGate] == nullptr) return 1.0f;
  return load_parameter<T>(in.parameter(kGate), has_gate_per_row(in) ? row : sample_of(in, row));
}

// Does a row count in its sentence's pooled gate.
__device__ __forceinline__ bool counts(const Call& in, int64_t row) {
  return in.pooling == Pooling::kMean || in.input_as<bool>(kMask)[row];
}

// The dropout factors of eight neighbouring elements of row `row` from column `column` on.
__device__ __forceinline__ Float8 dropout_of_row(const Call& in, int64_t row, int column) {
  return dropout_of(in.dropout, row * in.D + column);
}

// run(tile, has_first, has_second) for the tiles of the calling block, wave by wave. With a pooled
// gate the second part of a tile waits for the first one of all tiles of its sentence: where a block
// has several tiles in a wave it passes twice over them, otherwise both parts are one call.
template <class Params, class Run>
__device__ __forceinline__ void for_each_pass(const Params& p, bool is_pooled, Run&& run) {
  const int tiles = p.tiling.tiles;
#pragma unroll 1
  for (int wave = 0; wave < tiles; wave += p.wave_tiles) {
    const int end = wave + p.wave_tiles < tiles ? wave + p.wave_tiles : tiles;
    const int passes = is_pooled && end - wave > grid_blocks_x() ? 2 : 1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
        run(tile, pass == 0, pass == passes - 1);
      }
    }
  }
}

// ---- a pooled gate, in forward ----

// The tile's share of its sentence's gate, by the first warp; the others go on. A sum is over 16 rows
// whatever the tile's height is: that depends on how many sentences there are, and a sentence's gate
// does not.
__device__ __forceinline__ void publish_gate(const ForwardParams& p, const float* logits,
                                             const TileRows& rows) {
  if (warp_index() != 0) return;
  const int64_t in_group = rows.first - rows.group * p.tiling.group_rows;
  const int64_t at = static_cast<int64_t>(rows.group) * p.gate_sums + in_group / kGateRows;
  float* partial = p.gate_partial + 2 * at;
#pragma unroll 1  // twice at most: what it costs is code
  for (int first = 0; first < rows.count; first += 32) {
    const int r = first + lane_index();
    const bool is_counted = r < rows.count && counts(p.in, rows.first + r);
    // Padding adds 0, not 0 times what may be NaN.
    const float sum = group_sum<kGateRows>(is_counted ? sigmoid(logits[r]) : 0.0f);
    const float count = group_sum<kGateRows>(is_counted ? 1.0f : 0.0f);
    if (r < rows.count && r % kGateRows == 0) {
      partial[r / kGateRows * 2] = sum;
      partial[r / kGateRows * 2 + 1] = count;
    }
  }
  sync_warp();  // the first lane's release covers what the others have left
  if (lane_index() == 0) atomic_add_release(p.arrivals + rows.group, 1);
}

__device__ __forceinline__ void await_gate(const ForwardParams& p, const TileRows& rows,
                                           float (&pooled)[2]) {
  await_sums(p.tiling, p.gate_sums, p.gate_partial, p.arrivals, rows, pooled);
  // One block of the sentence's writes what all of them have found.
  if (rows.index_in_group == 0 && thread_index() == 0) {
    p.in.output_as<float>(kGateValue)[rows.group] = pooled[0] / pooled[1];
  }
}

// Launches a kernel whose blocks take the tiles of p.tiling in turn, wave by wave: as many blocks as
// the device holds at once. With a pooled gate they wait for each other, so the launch is
// cooperative.
template <auto kKernel, class Params>
void launch_over_tiles(const char* name, Params p, int threads, size_t shared_bytes) {
  LaunchShape shape;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  const int resident = resident_blocks<kKernel>(name, threads, shape.shared_bytes);
  shape.blocks_x = p.tiling.tiles < resident ? p.tiling.tiles : resident;
  shape.is_cooperative = has_pooled_gate(p.in);
  p.wave_tiles = shape.is_cooperative ? wave_of(p.tiling, shape.blocks_x) : p.tiling.tiles;
  launch<kKernel>(name, shape, p.in.stream, p);
}

}  // namespace pelt::gated_adapter
