// Scores in units of log 2, and which of them dropout keeps, for tiles of two orientations: rows
// are queries ("by rows", forward and dq), or rows are columns of the joined axis ("by columns", dk
// and dv).
#pragma once

#include "ops/prefix_attention/tiles.cuh"

namespace pelt::prefix_attention {

// The rows of a warp's tile as its lanes hold them.
__device__ __forceinline__ int tile_row(int m, int half) {
  return 16 * m + lane_index() / 4 + 8 * half;
}

// What one sample and head do to every score.
struct Scoring {
  float own_factor;      // scale log2(e): of own columns
  float prefix_factor;   // scale log2(e) gate: of prefix columns
  float gate;            // 1 without one
  const bool* key_mask;  // [N] of the sample
  Parameter bias;
  int64_t bias_offset;  // of the head's [S, N]
};

template <class T>
__device__ __forceinline__ Scoring scoring_of(const CudaInputs& in, const Head& head) {
  Scoring scoring;
  scoring.gate = gate_of<T>(in, head);
  scoring.own_factor = in.scale * kLog2e;
  scoring.prefix_factor = scoring.gate * scoring.own_factor;
  scoring.key_mask = in.mask_of(head.b);
  scoring.bias = in.parameter(kBias);
  scoring.bias_offset = head.b * in.bias_batch_stride + head.h * in.bias_head_stride;
  return scoring;
}

// Bit i is set if a sample's key mask [N] shows the i-th of these columns. Prefix columns are
// always seen, columns from `end` on never. One register of bits is read before the products, so
// that no load of the mask waits behind them.
template <int kCount, class ColumnOf>
__device__ __forceinline__ uint32_t visible_bits(const CudaInputs& in, const bool* key_mask,
                                                 int end, ColumnOf&& column_of) {
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

// Adds the bias to the scores of own columns. Columns beyond its last one read the last one,
// because score_by_rows hides them afterwards. Each row is a branch of its own on purpose: without
// it the compiler computes all addresses at once, and they take the registers of the accumulators.
template <class Element, int kTilesM, int kTilesN>
__device__ __forceinline__ void add_bias_by_rows(const CudaInputs& in, const Scoring& scoring,
                                                 FragmentD (&scores)[kTilesM][kTilesN], int row,
                                                 int column) {
  const Element* bias = static_cast<const Element*>(scoring.bias.data) + scoring.bias_offset;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + tile_row(m, half);
      if (query >= in.S) continue;
      const Element* from = bias + static_cast<int64_t>(query) * in.N;  // [N]
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = column + 8 * n + FragmentD::column(e) - in.P;
          const int inside = key < 0 ? 0 : (key < in.N ? key : in.N - 1);
          const float value = to_float(from[inside]) * kLog2e;
          scores[m][n].r[2 * half + e] += key < 0 ? 0.0f : value;  // a prefix column has no bias
        }
      }
    }
  }
}

// Turns products into scores, with queries as rows: factors, then bias, then -inf where a column is
// hidden. `visible` is what visible_bits gives. Each pass runs only where it has something to do.
//
// Returns a factor that the caller still has to apply. Own columns without a bias all have the same
// factor, which costs nothing as part of the exponent's multiply-add; it is positive, so that the
// row's maximum may be taken before it.
template <class T, int kTilesM, int kTilesN>
__device__ __forceinline__ float score_by_rows(const CudaInputs& in, const Scoring& scoring,
                                               float prefix_factor,
                                               FragmentD (&scores)[kTilesM][kTilesN], int row,
                                               int column, int end, uint32_t visible) {
  constexpr int kStep = 8 * kTilesN;
  const bool is_factor_left =
      column >= in.P && scoring.bias.data == nullptr && scoring.own_factor > 0.0f;
  if (!is_factor_left) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_prefix = column + 8 * n + FragmentD::column(i) < in.P;
        const float factor = is_prefix ? prefix_factor : scoring.own_factor;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) scores[m][n].r[i] *= factor;
      }
    }
    if (scoring.bias.data != nullptr && column + kStep > in.P && in.N > 0) {
      if (scoring.bias.is_float32) {
        add_bias_by_rows<float>(in, scoring, scores, row, column);
      } else {
        add_bias_by_rows<T>(in, scoring, scores, row, column);
      }
    }
  }
  const float factor = is_factor_left ? scoring.own_factor : 1.0f;
  if (scoring.key_mask != nullptr) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool is_hidden = (visible >> (2 * n + e) & 1u) == 0;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          scores[m][n].r[e] = is_hidden ? kMinusInfinity : scores[m][n].r[e];
          scores[m][n].r[2 + e] = is_hidden ? kMinusInfinity : scores[m][n].r[2 + e];
        }
      }
    }
  }
  // The first row sees the fewest columns; if it sees all of these, every row does.
  if (column + kStep <= row_limit(in, row, end)) return factor;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Counted from the lane's first column, so that what is compared below are constants.
      const int limit = row_limit(in, row + tile_row(m, half), end) - column - FragmentD::column(0);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = scores[m][n].r[2 * half + e];
          value = 8 * n + e < limit ? value : kMinusInfinity;
        }
      }
    }
  }
  return factor;
}

// Where dropout's words of a head's rows begin. One call of Philox gives the words of four columns,
// which start at a multiple of 4 of the joined axis; the contract counts a row of probabilities
// padded to a multiple of 4, so that no call reaches over the end of a row.
struct DropoutRows {
  int64_t first;    // the number of the head's row 0
  int64_t columns;  // ceil((P + N) / 4)

  __device__ __forceinline__ static DropoutRows of(const CudaInputs& in, const Head& head) {
    return {head_index(in, head) * in.S, (static_cast<int64_t>(in.P) + in.N + 3) / 4};
  }

  // Bit w is set if dropout keeps word w of the four columns from `column` on.
  __device__ __forceinline__ uint32_t kept(const CudaInputs& in, int row, int column) const {
    const uint64_t group =
        static_cast<uint64_t>((first + row) * columns + static_cast<int64_t>(column / 4));
    const PhiloxWords words =
        philox4x32_10({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}},
                      in.dropout_keys);
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      bits |= static_cast<uint32_t>(words.word[w] >= in.dropout.threshold) << w;
    }
    return bits;
  }
};

// Which elements of kTiles fragments [16, 8], side by side, dropout keeps: of fragment n, element
// i, the bit kept_bit_by_rows(n, i).
//
// Of a fragment's row four lanes hold two columns each, and one call of Philox gives four columns:
// two neighbouring lanes hold the same four columns in the same two rows. Each of them computes the
// words of one row, and they exchange the bits, so that no word is computed twice.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_by_rows(const CudaInputs& in, const DropoutRows& rows,
                                                 int row, int column) {
  static_assert(kTiles <= 4, "eight bits for each fragment");
  const int lane = lane_index(), query = row + lane / 4 + 8 * (lane % 2);
  uint32_t bits = 0;
  // Not unrolled: several calls of ten rounds at once would take the accumulators' registers.
#pragma unroll 1
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t four = rows.kept(in, query, column + 8 * n + lane % 4 / 2 * 4);
    bits |= four << (8 * n + 4 * (lane % 2));
  }
  return bits | shfl_xor(bits, 1);
}

// A byte for each fragment: four bits for each of the lane's two rows (i / 2), of which the lane's
// two columns are the lower or the upper pair.
__device__ __forceinline__ int kept_bit_by_rows(int n, int i) {
  return 8 * n + 4 * (i / 2) + 2 * (lane_index() % 2) + i % 2;
}

// The same where the fragments' rows are columns [column, column + 16) and their columns are
// queries [row, row + 16), two fragments. Here the lanes l, l ^ 4, l ^ 8 and l ^ 12 hold the same
// two queries in four neighbouring columns, and those 8 further down: four calls of Philox, one for
// each lane.
__device__ __forceinline__ uint32_t kept_by_columns(const CudaInputs& in, const DropoutRows& rows,
                                                    int column, int row) {
  const int lane = lane_index(), turn = lane / 4 % 4;  // which of the four calls is the lane's
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < 2; ++n) {
    const uint32_t four =
        rows.kept(in, row + 8 * n + lane % 4 * 2 + turn % 2, column + lane / 16 * 4 + turn / 2 * 8);
    bits |= four << (16 * n + 4 * turn);
  }
  bits |= shfl_xor(bits, 4);
  return bits | shfl_xor(bits, 8);
}

// Sixteen bits for each fragment: four for each call, in the order of the lane's elements.
__device__ __forceinline__ int kept_bit_by_columns(int n, int i) {
  return 16 * n + 4 * i + lane_index() / 4 % 4;
}

}  // namespace pelt::prefix_attention
