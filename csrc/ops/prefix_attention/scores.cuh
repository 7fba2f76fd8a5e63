// Scores in units of log 2, and which of them dropout keeps, for tiles of two orientations: rows
// are queries ("by rows", forward and dq), or rows are columns of the joined axis ("by columns", dk
// and dv).
#pragma once

#include "ops/prefix_attention/tiles.cuh"

namespace pelt::prefix_attention {

// What one sample and head do to every score.
struct Scoring {
  float own_factor;      // scale, log 2 e
  float prefix_factor;   // and the gate
  float gate;            // 1 without one
  const bool* key_mask;  // [N] of the sample
  Parameter bias;
  int64_t bias_at;  // of the head's [S, N]

  // Does every score of these columns only take the factor: no bias, no mask, no prefix?
  __device__ __forceinline__ bool is_plain(const Inputs& in, int first, int end, int limit) const {
    return first >= in.P && end <= limit && key_mask == nullptr && bias.data == nullptr;
  }
};

template <class T>
__device__ __forceinline__ Scoring scoring_of(const Inputs& in, const Head& head) {
  Scoring scoring;
  scoring.gate = gate_of<T>(in, head);
  scoring.own_factor = in.scale * kLog2e;
  scoring.prefix_factor = scoring.gate * scoring.own_factor;
  scoring.key_mask =
      in.key_mask == nullptr ? nullptr : in.key_mask + static_cast<int64_t>(head.b) * in.N;
  scoring.bias = in.bias;
  scoring.bias_at = head.b * in.bias_batch_stride + head.h * in.bias_head_stride;
  return scoring;
}

// Bit i: does a sample's key mask [N] show the i-th of these columns? Prefix columns are always
// seen; columns from `end` on are not.
template <int kCount, class ColumnOf>
__device__ __forceinline__ uint32_t seen_columns(const Inputs& in, const bool* key_mask, int end,
                                                 ColumnOf&& column_of) {
  if (key_mask == nullptr) return ~uint32_t{0};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = column_of(i);
    const bool is_seen = column < in.P || (column < end && key_mask[column - in.P]);
    bits |= static_cast<uint32_t>(is_seen) << i;
  }
  return bits;
}

// A score from q . k: -inf where the row does not see the column.
template <class T>
__device__ __forceinline__ float score(const Inputs& in, const Scoring& scoring, float dot, int row,
                                       int column, bool is_seen) {
  if (column < in.P) return dot * scoring.prefix_factor;
  float value = dot * scoring.own_factor;
  if (scoring.bias.data != nullptr && is_seen && row < in.S) {
    const int64_t at = scoring.bias_at + static_cast<int64_t>(row) * in.N + column - in.P;
    value += kLog2e * load_parameter<T>(scoring.bias, at);
  }
  return is_seen ? value : kMinusInfinity;
}

// Dropout's words come four columns at a time, for columns that start at a multiple of 4 of the
// joined axis; a row of probabilities is padded to a multiple of 4.
struct DropoutRows {
  int64_t first;    // the number of the head's row 0
  int64_t columns;  // ceil((P + N) / 4)

  __device__ __forceinline__ static DropoutRows of(const Inputs& in, const Head& head) {
    return {head_index(in, head) * in.S, (static_cast<int64_t>(in.P) + in.N + 3) / 4};
  }

  // Bit w: is word w of the four columns from `column` on kept?
  __device__ __forceinline__ uint32_t kept(const Dropout& dropout, int row, int column) const {
    const uint64_t group =
        static_cast<uint64_t>((first + row) * columns + static_cast<int64_t>(column / 4));
    const PhiloxWords words = philox4x32_10(
        {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}},
        static_cast<uint32_t>(dropout.seed), static_cast<uint32_t>(dropout.seed >> 32));
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      bits |= static_cast<uint32_t>(words.word[w] >= dropout.threshold) << w;
    }
    return bits;
  }
};

// Which elements of kTiles fragments [16, 8], side by side, dropout keeps: of fragment n, element
// i, the bit kept_bit_by_rows(n, i). Two lanes share four columns in two rows, so each computes the
// words of one row and they exchange the bits: every word is computed once.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_by_rows(const Dropout& dropout, const DropoutRows& rows,
                                                 int row, int column) {
  static_assert(kTiles <= 4, "eight bits for each fragment");
  const int lane = lane_index(), own_row = row + lane / 4 + 8 * (lane % 2);
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t four = rows.kept(dropout, own_row, column + 8 * n + lane % 4 / 2 * 4);
    bits |= four << (8 * n + 4 * (lane % 2));
  }
  return bits | shfl_xor(bits, 1);
}

__device__ __forceinline__ int kept_bit_by_rows(int n, int i) {
  return 8 * n + 4 * (i / 2) + 2 * (lane_index() % 2) + i % 2;
}

// The same where the fragments' rows are columns [column, column + 16) and their columns are
// queries [row, row + 16), two fragments. Four lanes share four columns in four rows.
__device__ __forceinline__ uint32_t kept_by_columns(const Dropout& dropout, const DropoutRows& rows,
                                                    int column, int row) {
  const int lane = lane_index(), own = lane / 4 % 4;
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < 2; ++n) {
    const uint32_t four = rows.kept(dropout, row + 8 * n + lane % 4 * 2 + own % 2,
                                    column + lane / 16 * 4 + own / 2 * 8);
    bits |= four << (16 * n + 4 * own);
  }
  bits |= shfl_xor(bits, 4);
  return bits | shfl_xor(bits, 8);
}

__device__ __forceinline__ int kept_bit_by_columns(int n, int i) {
  return 16 * n + 4 * i + lane_index() / 4 % 4;
}

// The rows of a warp's tile as its lanes hold them.
__device__ __forceinline__ int tile_row(int m, int half) {
  return 16 * m + lane_index() / 4 + 8 * half;
}

}  // namespace pelt::prefix_attention
