// The kit of kernels over the rows of activations. A block of 4 warps has one tile of rows at a
// time, of which chunks of 64 columns pass through shared memory:
//
//      rows_of_tile      which rows they are            load_parameter   elements of either dtype
//      member_of         which member of a bank         stage            parameters into a tile
//      for_each_8        a warp's sums as rows of 8     dropout_of       factors of eight elements
//      leave_sums, await_sums                           sums over a group's tiles
//
// T is the activation's type throughout.
#pragma once

#include "common/parameter.h"
#include "common/tiling.h"
#include "cuda/device.cuh"

namespace pelt::rows {

constexpr int kVectors = kChunk / 8;             // 16-byte vectors in a row of a chunk
constexpr int kChunkStride = kChunk + kTilePad;  // elements from row to row of a chunk
constexpr int kOutStride = kChunk + 4;  // floats; 4 more put neighbouring rows into other banks

// ---- which rows ----

struct TileRows {
  int64_t first;  // in [0, B * S)
  int count;      // up to the tile's rows; less in the last tile of a group
  int group;
  int index_in_group;
};

template <int kTileRows>
__device__ __forceinline__ TileRows rows_of_tile(const Tiling& tiling, int tile) {
  TileRows rows;
  rows.group = tile / tiling.tiles_per_group;
  rows.index_in_group = tile % tiling.tiles_per_group;
  const int64_t offset = static_cast<int64_t>(rows.index_in_group) * kTileRows;
  const int64_t left = tiling.group_rows - offset;
  rows.first = rows.group * tiling.group_rows + offset;
  rows.count = left < kTileRows ? static_cast<int>(left) : kTileRows;
  return rows;
}

// Which member of a bank serves a tile. With one index for each sample the group is the sample. An
// index outside of the bank cannot be refused without waiting for the device: it is clamped, so
// that nothing outside of the bank is read.
__device__ __forceinline__ int64_t member_of(const int64_t* index, bool is_per_sample, int group,
                                             int members) {
  if (index == nullptr) return 0;
  const int64_t member = index[is_per_sample ? group : 0], last = members - 1;
  return member < 0 ? 0 : (member < last ? member : last);
}

// ---- elements of parameters and of their gradients, whichever of the two dtypes they have ----

// In float32: masters are not rounded here, but where they meet an mma.
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

// One element as a product would see it: rounded to the activation's type. What is added to a
// product's result is rounded like that, so that a master in float32 puts no sum on another side of
// an activation's corner than the same parameter in 16 bits does.
template <class T>
__device__ __forceinline__ float load_rounded(const Parameter& parameter, int64_t i) {
  return to_float(round_to<T>(load_parameter<T>(parameter, i)));
}

template <class T>
__device__ __forceinline__ void store_grad(const ParameterGrad& grad, int64_t i, float value) {
  if (grad.data == nullptr) return;  // not wanted
  if (grad.is_float32) {
    static_cast<float*>(grad.data)[i] = value;
  } else {
    static_cast<T*>(grad.data)[i] = round_to<T>(value);
  }
}

// ---- into shared memory ----

// A rectangle of a matrix whose rows are `leading` elements apart; (0, 0) is at `offset`. Before
// row `begin` and beyond `rows` and `columns` there is nothing: those elements are staged as zeros.
struct Rectangle {
  int64_t offset;
  int leading;
  int rows;
  int columns;
  int begin = 0;
};

// Brings kRows x kColumns elements into a tile. 16-bit vectors that lie whole at 16-byte borders
// come by asynchronous copies, others (float32 masters, odd ranks and offsets) through registers.
// The caller commits the copies and waits for them.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void stage(T* tile, int stride, const Parameter& source,
                                      const Rectangle& from) {
  constexpr int kVectorsPerRow = kColumns / 8;
  const bool is_aligned = from.leading % 8 == 0 && from.offset % 8 == 0;
  for (int i = thread_index(); i < kRows * kVectorsPerRow; i += kThreads) {
    const int row = i / kVectorsPerRow, column = i % kVectorsPerRow * 8;
    const bool is_there = row >= from.begin && row < from.rows && column < from.columns;
    const bool is_whole = is_aligned && (!is_there || column + 8 <= from.columns);
    // An address that is not read still has to be one of the matrix.
    const int64_t at =
        is_there ? from.offset + static_cast<int64_t>(row) * from.leading + column : 0;
    T* to = tile + row * stride + column;
    if (is_whole && !source.is_float32) {
      cp_async_16(to, static_cast<const T*>(source.data) + at, is_there);
      continue;
    }
    Float8 values = {};
    if (is_whole && is_there) {
      values = load_parameter_8<T>(source, at);
    } else if (is_there) {
      for (int e = 0; e < 8; ++e) {
        if (column + e < from.columns) values.v[e] = load_parameter<T>(source, at + e);
      }
    }
    store_16(to, narrow<T>(values));
  }
}

// The dropout factors of eight neighbouring elements from `element`, a multiple of 4, on.
__device__ __forceinline__ Float8 dropout_of(const Dropout& dropout, int64_t element) {
  Float8 factors;
  for (int half = 0; half < 2; ++half) {
    float quad[4];  // of one Philox block
    dropout.factors_of_4(element + 4 * half, quad);
    for (int e = 0; e < 4; ++e) factors.v[4 * half + e] = quad[e];
  }
  return factors;
}

// ---- out of the fragments ----

// Fragments [16, 64] of a warp leave through its part `out` of shared memory, [16, kOutStride]: a
// lane then has eight neighbouring columns, so that rows come and go in 16-byte accesses.
// visit(turn, row of the tile, column, values) is for what exists below `columns`; the row is lane
// / 8 + 4 turn of the warp's 16, the eight columns those of lane % 8 from `first` on.
template <class Visit>
__device__ __forceinline__ void for_each_8(float* out, const TileRows& rows, int first, int columns,
                                           const FragmentD (&sums)[kChunk / 8], Visit&& visit) {
  sync_warp();  // `out` is free: all lanes have read the chunk before
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[FragmentD::row(i) * kOutStride + 8 * n + FragmentD::column(i)] = sums[n].r[i];
    }
  }
  sync_warp();  // a lane reads what others wrote
  const int column = lane_index() % kVectors * 8;
#pragma unroll  // so that visitors may keep sums in registers by `turn`
  for (int turn = 0; turn < 4; ++turn) {
    const int row = lane_index() / kVectors + 4 * turn;
    if (warp_index() * 16 + row >= rows.count || first + column >= columns) continue;
    Float8 values;
    for (int e = 0; e < 8; ++e) values.v[e] = out[row * kOutStride + column + e];
    visit(turn, warp_index() * 16 + row, first + column, values);
  }
}

// ---- sums over a group's tiles, in launches whose blocks wait for each other ----

// Called by one warp, with each lane's share: leaves the tile's sum and its number of rows that
// count in partial [tiles, 2], and announces them.
__device__ __forceinline__ void leave_sums(float* partial, int* arrivals, const TileRows& rows,
                                           int tile, float sum, float count) {
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane_index() != 0) return;
  partial[2 * tile] = sum;
  partial[2 * tile + 1] = count;
  atomic_add_release(arrivals + rows.group, 1);
}

// Waits for all tiles of the group and adds what they left, `sums` of them for each group, in their
// order, into `total`, in shared memory. Called by the whole block.
__device__ __forceinline__ void await_sums(const Tiling& tiling, int sums, const float* partial,
                                           const int* arrivals, const TileRows& rows,
                                           float (&total)[2]) {
  if (thread_index() == 0) wait_until_at_least(arrivals + rows.group, tiling.tiles_per_group);
  sync_threads();  // the partial sums that thread 0 has waited for are visible to the block
  if (warp_index() == 0) {
    float sum = 0.0f, count = 0.0f;
    const float* first = partial + 2 * static_cast<int64_t>(rows.group) * sums;
#pragma unroll 1
    for (int i = lane_index(); i < sums; i += 32) {
      sum += first[2 * i];
      count += first[2 * i + 1];
    }
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (lane_index() == 0) {
      total[0] = sum;
      total[1] = count > 1.0f ? count : 1.0f;  // a sentence may have no row that counts
    }
  }
  sync_threads();  // `total` is there
}

}  // namespace pelt::rows
