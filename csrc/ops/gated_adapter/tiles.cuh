// What forward and backward share: which rows a tile has, how tiles of weights come into shared
// memory, and what has to be known of a row before its products.
#pragma once

#include "cuda/device.cuh"
#include "ops/gated_adapter/params.h"

namespace pelt::gated_adapter {

constexpr int kBlockT = 64;  // rows of a tile: 16 for each of 4 warps
constexpr int kChunk = 64;   // columns of x, y or a weight that are in shared memory at a time
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;  // buffers of the ring: one in use, two on the way
constexpr int kChunkStride = kChunk + kTilePad;
constexpr int kVectors = kChunk / 8;  // 16-byte vectors in a row of a chunk

struct TileRows {
  int64_t first;  // in [0, B * S)
  int count;      // up to kBlockT
  int group;
  int index_in_group;
};

__device__ __forceinline__ TileRows rows_of_tile(const Tiling& tiling, int tile) {
  TileRows rows;
  rows.group = tile / tiling.tiles_per_group;
  rows.index_in_group = tile % tiling.tiles_per_group;
  const int64_t offset = static_cast<int64_t>(rows.index_in_group) * kBlockT;
  const int64_t left = tiling.group_rows - offset;
  rows.first = rows.group * tiling.group_rows + offset;
  rows.count = left < kBlockT ? static_cast<int>(left) : kBlockT;
  return rows;
}

// One element of a parameter in float32.
template <class T>
__device__ __forceinline__ float load_parameter(const Parameter& parameter, int64_t i) {
  return parameter.is_float32 ? static_cast<const float*>(parameter.data)[i]
                              : to_float(static_cast<const T*>(parameter.data)[i]);
}

// Eight elements; i is a multiple of 8.
template <class T>
__device__ __forceinline__ Float8 load_parameter_8(const Parameter& parameter, int64_t i) {
  return parameter.is_float32 ? load_8(static_cast<const float*>(parameter.data) + i)
                              : load_8(static_cast<const T*>(parameter.data) + i);
}

// One element as a product would see it: rounded to the activation's type. What is added to h is
// rounded like that, so that a master in float32 puts no h on another side of phi's corner than the
// same parameter in 16 bits does.
template <class T>
__device__ __forceinline__ float load_rounded(const Parameter& parameter, int64_t i) {
  return to_float(round_to<T>(load_parameter<T>(parameter, i)));
}

// Which member of a bank serves a tile. With one index for each sample the group is the sample. An
// index of none of them, which nobody can refuse without waiting for the device, must not read
// somewhere else.
__device__ __forceinline__ int64_t member_of(const int64_t* index, bool is_per_sample, int group,
                                             int members) {
  if (index == nullptr) return 0;
  const int64_t member = index[is_per_sample ? group : 0], last = members - 1;
  return member < 0 ? 0 : (member < last ? member : last);
}

// A rectangle of a matrix whose rows are `leading` elements apart; (0, 0) is at `offset`. Beyond
// `rows` and `columns` there is nothing: those elements are staged as zeros.
struct Rectangle {
  int64_t offset;
  int leading;
  int rows;
  int columns;
};

// Brings kRows x kColumns elements into a tile. 16-bit rows that start at 16-byte borders come by
// asynchronous copies, others (float32 masters, odd ranks) through registers.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void stage_weight(T* tile, int stride, const Parameter& source,
                                             const Rectangle& from) {
  constexpr int kVectorsPerRow = kColumns / 8;
  const bool is_aligned = from.leading % 8 == 0;
  for (int i = thread_index(); i < kRows * kVectorsPerRow; i += kThreads) {
    const int row = i / kVectorsPerRow, column = i % kVectorsPerRow * 8;
    const bool is_there = row < from.rows && column < from.columns;
    const int64_t at =
        is_there ? from.offset + static_cast<int64_t>(row) * from.leading + column : 0;
    T* to = tile + row * stride + column;
    if (is_aligned && !source.is_float32) {
      cp_async_16(to, static_cast<const T*>(source.data) + at, is_there);
      continue;
    }
    Float8 values = {};
    if (is_aligned && is_there) {
      values = load_parameter_8<T>(source, at);
    } else if (is_there) {
      for (int e = 0; e < 8; ++e) {
        if (column + e < from.columns) values.v[e] = load_parameter<T>(source, at + e);
      }
    }
    store_16(to, narrow<T>(values));
  }
}

// What is known of each row of a tile, in shared memory.
struct RowState {
  float mean[kBlockT];  // of x, with a pre-norm
  float rstd[kBlockT];
  float logit[kBlockT];   // w . x + b of a learned gate
  float factor[kBlockT];  // scale g
};

// Mean and deviation of x for a pre-norm, and the gate's logit if it does not ride along with the
// down projection: the one extra read of x. A warp takes a row, so that its loads are coalesced.
template <class T>
__device__ __forceinline__ void measure_rows(const Inputs& in, const TileRows& rows,
                                             RowState& state, bool wants_logit) {
  const T* g_x = static_cast<const T*>(in.x);  // [B * S, D]
  for (int r = warp_index(); r < kBlockT; r += kWarps) {
    Moments moments;
    float dot = 0.0f;
    if (r < rows.count) {
      for (int d = lane_index() * 8; d < in.D; d += 32 * 8) {
        const Float8 x = load_8(g_x + (rows.first + r) * in.D + d);
        if (in.has_pre_norm()) moments.merge(Moments::of(x.v));
        if (!wants_logit) continue;
        const Float8 w = load_parameter_8<T>(in.gate_weight, d);
        for (int e = 0; e < 8; ++e) dot += x.v[e] * to_float(round_to<T>(w.v[e]));
      }
    }
    moments = group_moments<32>(moments);
    dot = warp_sum(dot);
    if (lane_index() != 0) continue;
    state.mean[r] = moments.mean;
    state.rstd[r] = r < rows.count ? moments.reciprocal_deviation(in.pre_norm_eps) : 0.0f;
    if (wants_logit) state.logit[r] = dot + load_parameter<T>(in.gate_bias, 0);
  }
}

// A chunk of pre_norm(x) [kBlockT, kChunk] from column `first` on; rows that are not there are
// zero.
template <class T>
__device__ __forceinline__ void stage_x(T* tile, const Inputs& in, const TileRows& rows,
                                        const RowState& state, int first) {
  const T* g_x = static_cast<const T*>(in.x);  // [B * S, D]
  for (int i = thread_index(); i < kBlockT * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * 8;
    const bool is_there = row < rows.count && first + column < in.D;
    const T* from = g_x + (is_there ? (rows.first + row) * in.D + first + column : 0);
    T* to = tile + row * kChunkStride + column;
    if (!in.has_pre_norm()) {
      cp_async_16(to, from, is_there);
      continue;
    }
    Float8 x = {};
    if (is_there) {
      x = load_8(from);
      const Float8 weight = load_parameter_8<T>(in.pre_norm_weight, first + column);
      const Float8 bias = load_parameter_8<T>(in.pre_norm_bias, first + column);
      for (int e = 0; e < 8; ++e) {
        x.v[e] = (x.v[e] - state.mean[row]) * state.rstd[row] * weight.v[e] + bias.v[e];
      }
    }
    store_16(to, narrow<T>(x));
  }
}

// scale lambda without the gate.
template <class T>
__device__ __forceinline__ float scale_of(const Inputs& in) {
  return in.scale_value * (in.scale.data == nullptr ? 1.0f : load_parameter<T>(in.scale, 0));
}

// The gate of a row that was given, or that forward has computed; 1 without one.
template <class T>
__device__ __forceinline__ float gate_of_row(const Inputs& in, const float* gate_value,
                                             int64_t row) {
  if (in.has_learned_gate()) {
    return gate_value[in.pooling == Pooling::kToken ? row : row / in.S];
  }
  if (in.gate.data == nullptr) return 1.0f;
  return load_parameter<T>(in.gate, in.has_gate_per_row ? row : row / in.S);
}

// The dropout factors of eight neighbouring elements of row `row` from column `column` on.
__device__ __forceinline__ Float8 dropout_of(const Inputs& in, int64_t row, int column) {
  Float8 factors;
  for (int half = 0; half < 2; ++half) {
    float quad[4];
    in.dropout.factors_of_4(row * in.D + column + 4 * half, quad);
    for (int e = 0; e < 4; ++e) factors.v[4 * half + e] = quad[e];
  }
  return factors;
}

}  // namespace pelt::gated_adapter
