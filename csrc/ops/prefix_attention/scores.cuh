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
  float prefix_factor;  // scale log2(e) gate: of prefix columns
  float gate;           // 1 without one
  Parameter bias;
  int64_t bias_offset;  // of the head's [S, N]
};

template <class T>
__device__ __forceinline__ Scoring scoring_of(const CudaInputs& in, const Head& head) {
  Scoring scoring;
  scoring.gate = gate_of<T>(in, head);
  scoring.prefix_factor = scoring.gate * (in.scale * kLog2e);
  scoring.bias = in.parameter(kBias);
  scoring.bias_offset = head.b * in.bias_batch_stride + head.h * in.bias_head_stride;
  return scoring;
}

// Two neighbouring elements whose place is a multiple of both.
__device__ __forceinline__ Float2 load_pair(const float* from) {
  const float2 pair = *reinterpret_cast<const float2*>(from);
  return {pair.x, pair.y};
}
template <class T>
__device__ __forceinline__ Float2 load_pair(const T* from) {
  return unpack<T>(load_4(from));
}

// Adds the bias to the scores of own columns, two columns at a time. Columns beyond its last one
// read the last ones, because their scores are hidden afterwards. Each row is a branch of its own
// on purpose: without it the compiler computes all addresses at once, and they take the registers
// of the accumulators.
template <class Element, int kTilesM, int kTilesN>
__device__ __forceinline__ void add_bias_by_rows(const CudaInputs& in, const Scoring& scoring,
                                                 FragmentD (&scores)[kTilesM][kTilesN], int row,
                                                 int column) {
  const Element* bias = static_cast<const Element*>(scoring.bias.data) + scoring.bias_offset;
  // Pairs are whole in every row: no lane's pair has a prefix column and an own one, either.
  const bool is_aligned = in.N % 2 == 0 && (column - in.P) % 2 == 0 &&
                          reinterpret_cast<uintptr_t>(bias) % (2 * sizeof(Element)) == 0;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + tile_row(m, half);
      if (query >= in.S) continue;
      const Element* from = bias + static_cast<int64_t>(query) * in.N;  // [N]
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        const int key = column + 8 * n + FragmentD::column(0) - in.P;
        float (&score)[4] = scores[m][n].r;
        if (is_aligned) {
          if (key < 0) continue;  // prefix columns have no bias
          const Float2 pair = load_pair(from + (key < in.N ? key : in.N - 2));
          score[2 * half] += pair.low * kLog2e;
          score[2 * half + 1] += pair.high * kLog2e;
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = key + e;
            const int inside = at < 0 ? 0 : (at < in.N ? at : in.N - 1);
            const float value = to_float(from[inside]) * kLog2e;
            score[2 * half + e] += at < 0 ? 0.0f : value;
          }
        }
      }
    }
  }
}

// Hides columns whose products have not started from 0, after what may have moved a score from
// -inf: a factor that is not positive, a bias that is not finite.
template <int kTilesM, int kTilesN, class StartOf>
__device__ __forceinline__ void hide_columns(FragmentD (&scores)[kTilesM][kTilesN],
                                             StartOf&& start) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const FragmentD first = start(n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        scores[m][n].r[i] = first.r[i] == 0.0f ? scores[m][n].r[i] : kMinusInfinity;
      }
    }
  }
}

// Turns products into scores, with queries as rows: factors, then bias, then -inf where a row does
// not see a column. Columns that no row sees are -inf already; start(n) is what their products have
// started from. Each pass runs only where it has something to do.
//
// Returns a factor that the caller still has to apply. Own columns without a bias all have the same
// factor, which costs nothing as part of the exponent's multiply-add; it is positive, so that the
// row's maximum may be taken before it.
template <class T, int kTilesM, int kTilesN, class StartOf>
__device__ __forceinline__ float score_by_rows(const CudaInputs& in, const Scoring& scoring,
                                               float prefix_factor,
                                               FragmentD (&scores)[kTilesM][kTilesN],
                                               StartOf&& start, int row, int column) {
  constexpr int kStep = 8 * kTilesN;
  const float own_factor = in.scale * kLog2e;
  const bool is_plain = in.scale > 0.0f && !in.has_bias();
  float factor = own_factor;
  if (column < in.P || !is_plain) {
    factor = 1.0f;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool is_prefix = column + 8 * n + FragmentD::column(i) < in.P;
        const float each = is_prefix ? prefix_factor : own_factor;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          scores[m][n].r[i] *= each;
          scores[m][n].r[2 + i] *= each;
        }
      }
    }
    if (in.has_bias() && column + kStep > in.P && in.N > 0) {
      if (scoring.bias.is_float32) {
        add_bias_by_rows<float>(in, scoring, scores, row, column);
      } else {
        add_bias_by_rows<T>(in, scoring, scores, row, column);
      }
    }
    if (!is_plain) hide_columns(scores, start);
  }
  // Under a causal mask the first row sees the fewest columns; if it sees all of these, every row
  // does.
  if (!in.is_causal || column + kStep <= causal_limit(in, row)) return factor;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Counted from the lane's first column, so that what is compared below are constants.
      const int limit = causal_limit(in, row + tile_row(m, half)) - column - FragmentD::column(0);
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

// Is nothing to be done to the scores of `count` columns from `column` on, with queries from `row`
// on, but to multiply them by a positive factor, and nothing to the probabilities? Columns that no
// row sees are hidden anyway.
__device__ __forceinline__ bool is_plain(const CudaInputs& in, int row, int column, int count) {
  return column >= in.P && in.scale > 0.0f && !in.has_bias() && !in.dropout.is_active() &&
         (!in.is_causal || column + count <= causal_limit(in, row));
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
