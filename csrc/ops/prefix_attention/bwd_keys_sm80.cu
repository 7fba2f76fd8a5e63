// prefix_attention, backward, second launch: dk and dv, of own columns and of prefixes.
//   dV = (dropout g P)^T dout,  dK = scale g dS^T Q      with P, D and dS as in the first launch
//
// A block takes a tile of columns and walks the queries that see them (walk.cuh). It computes
// scores with columns as rows, S^T = K Q^T, because the accumulators of that product are, as they
// lie in registers, the left operand of dK += dS^T Q and dV += P^T dout: nothing of size [S, P + N]
// goes through shared memory, and dk and dv stay in registers until the end.
//
//        K, V [columns, E]      | Q, dout 64 rows | Q, dout 64 rows | ...
//        |########| x 2    x    |  heads of a group, and for prefixes samples, one after another
//
// Own columns: one sample, all heads that share these keys. At E <= 64 a warp has 32 of the 64
// columns and half of each 64 queries, since each fragment of Q or dout that it loads then serves
// two tiles; the two warps with the same columns add their sums at the end. With wider heads it has
// 16 columns and all queries. Columns that no query sees are summed, too, without a mask, and stored
// as zeros: what is summed for one column goes to no other.
//
// Prefix columns: a tile of 16 for the whole block, whose warps take 16 of each 64 queries, because
// a prefix is short and its sum long: over all queries of one chunk of the batch (of a table: of
// those samples that use this member). The warps' sums are added in their order, those of chunks by
// the last launch, so nothing depends on timing.
//
// With dropout tiles start at a multiple of 4 of the joined axis, where its words do; columns of a
// tile that are not the block's are zeros, and their results are not stored.
//
// Shared memory per block, E = 32, 64, 96, 128: 32, 56, 55, 106 KB.
#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"
#include "ops/prefix_attention/walk.cuh"

namespace pelt::prefix_attention {
namespace {

// Queries that a warp works on at a time: more where scores have one factor and probabilities none
// (a plain step), 16 in general, for which the registers suffice.
constexpr int kPlainStep = 32;
constexpr int kGeneralStep = 16;

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  // [16, 16] tiles of own columns that a warp holds: two where registers allow, since a fragment of
  // Q or dout that is loaded serves them all.
  static constexpr int kOwnTilesM = kE <= 64 ? 2 : 1;
  // With one tile K and V stay in registers where there is room; they arrive in the second buffer,
  // which is free until the second tile of queries comes.
  static constexpr bool kKeepsKeys = kE == 96;
  static constexpr int kMinBlocks = 2;
};

// How the warps of a block share its columns and each tile of queries.
template <class C, bool kIsPrefix>
struct Warps {
  static constexpr int kTilesM = kIsPrefix ? 1 : C::kOwnTilesM;
  static constexpr int kColumns = 16 * kTilesM;  // of a warp
  static constexpr int kGroups = kIsPrefix ? kWarps : kWarps * kColumns / kOwnTile;
  static constexpr int kRows = kRowTile / kGroups;  // of a tile of queries that a warp takes
  static_assert(kRows % kGeneralStep == 0 && (kIsPrefix || kRows % kPlainStep == 0),
                "a warp takes its queries in whole steps");
  static_assert(!kIsPrefix || kColumns == kPrefixTile, "the plan counts these tiles");

  // The warp's first column of the block's.
  __device__ __forceinline__ static int column() { return warp_index() / kGroups * kColumns; }
  // Which of the groups of queries the warp takes.
  __device__ __forceinline__ static int group() { return warp_index() % kGroups; }
};

template <class C>
struct Shared {
  // Two buffers of [kRowTile, E]; at the end the first one of q holds dk, of dout dv.
  alignas(16) typename C::T q[2][kRowTile * C::kStride];
  alignas(16) typename C::T dout[2][kRowTile * C::kStride];
  // [2, kOwnTile, E]: K and V, where they do not stay in registers.
  alignas(16) typename C::T keys[C::kKeepsKeys ? 1 : 2 * kOwnTile * C::kStride];
  alignas(16) float lse[2][kRowTile];  // in units of log 2, from the first launch
  alignas(16) float delta[2][kRowTile];
  // The same for all threads, and here instead of in registers, which sums and operands fill.
  Columns columns;
  Range range;
  Walk walk[2];  // which queries each buffer holds
  int scratch[kWarps];
};

// Where K and V of the block lie in shared memory; with kKeepsKeys only until the second tile of
// queries is staged there.
template <class C>
__device__ __forceinline__ typename C::T* keys_of(Shared<C>& s) {
  return C::kKeepsKeys ? s.q[1] : s.keys;
}

template <class C>
__device__ __forceinline__ typename C::T* values_of(Shared<C>& s) {
  return C::kKeepsKeys ? s.dout[1] : s.keys + kOwnTile * C::kStride;
}

// What a warp carries along the queries: sums for its columns, and its operands with kKeepsKeys.
template <class C, int kTilesM>
struct State {
  FragmentD dk[kTilesM][C::kE / 8];
  FragmentD dv[kTilesM][C::kE / 8];
  FragmentA k[kTilesM][C::kKeepsKeys ? C::kE / 16 : 1];
  FragmentA v[kTilesM][C::kKeepsKeys ? C::kE / 16 : 1];
};

// Starts copies of the block's keys and values. Columns of the tile that are not the block's, and
// own columns that no query sees, become zeros.
template <class C>
__device__ __forceinline__ void stage_keys(Shared<C>& s, const CudaInputs& in, int b) {
  using T = typename C::T;
  const Columns& columns = s.columns;
  const int g = columns.g;
  T* s_k = keys_of<C>(s);
  T* s_v = values_of<C>(s);
  // A tile of own columns has 64 rows, one of a prefix 16.
  const int count = columns.prefix < 0 ? kOwnTile : kPrefixTile;
  const T* g_k = head_rows<T>(in, kK, b, g);  // [N, E]
  const T* g_v = head_rows<T>(in, kV, b, g);  // [N, E]
  const ReadColumns read(in, b);
#pragma unroll 1
  for (int i = thread_index(); i < count * C::kVectors; i += kThreads) {
    const int row = i / C::kVectors, e = i % C::kVectors * 8, column = columns.first + row;
    const int to = row * C::kStride + e;
    const bool is_there = column >= columns.begin && column < columns.end;
    if (columns.prefix < 0 || !is_there) {
      const int n = column - in.P;
      const bool is_read = is_there && read.has(n);
      // An address that is not read still has to lie at a 16-byte border, as the tensor itself does.
      cp_async_16(s_k + to, is_read ? g_k + n * row_stride(in, kK) + e : in.input_as<T>(kK),
                  is_read);
      cp_async_16(s_v + to, is_read ? g_v + n * row_stride(in, kV) + e : in.input_as<T>(kV),
                  is_read);
    } else {
      const int prefix = columns.prefix;
      stage_prefix_8<T>(shared_address(s_k + to), in.parameter(kPrefixK + prefix),
                        prefix_offset(in, kPrefixK, prefix, columns.member, g, column) + e);
      stage_prefix_8<T>(shared_address(s_v + to), in.parameter(kPrefixV + prefix),
                        prefix_offset(in, kPrefixV, prefix, columns.member, g, column) + e);
    }
  }
}

// Starts copies of a tile of 64 queries: Q, dout, and the lse and D that the first launch wrote, in
// rows padded to whole tiles, so that 16 threads for each of the two bring them whole.
template <class C>
__device__ __forceinline__ void stage_queries(Shared<C>& s, const BackwardParams& p,
                                              const Walk& walk, int buffer) {
  using T = typename C::T;
  const CudaInputs& in = p.in;
  const int first_row = walk.tile * kRowTile, i = thread_index();
  const int64_t head = static_cast<int64_t>(walk.b) * in.H + walk.h;
  stage_rows<C, kRowTile>(s.q[buffer], head_rows<T>(in, kQ, walk.b, walk.h), row_stride(in, kQ),
                          first_row, in.S);
  stage_rows<C, kRowTile>(s.dout[buffer], in.doutput_as<T>(kOut) + head * in.S * C::kE, C::kE,
                          first_row, in.S);
  const int64_t padded = head * p.padded_rows + first_row;
  if (i < kRowTile / 4) {
    cp_async_16(&s.lse[buffer][4 * i], p.row_lse + padded + 4 * i, true);
  } else if (i < kRowTile / 2) {
    cp_async_16(&s.delta[buffer][4 * i - kRowTile], p.row_delta + padded + 4 * i - kRowTile, true);
  }
}

// Adds the bias, as add_bias_by_rows does; the bias of the head begins at element `bias_offset`.
// Rows and columns beyond the last one read the last one: their p is 0, by lse, or is not stored.
template <class Element, int kTilesM, int kTilesN>
__device__ __forceinline__ void add_bias_by_columns(const CudaInputs& in, int64_t bias_offset,
                                                    FragmentD (&scores)[kTilesM][kTilesN],
                                                    int column, int row) {
  const Element* bias = in.input_as<Element>(kBias) + bias_offset;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int query = row + 8 * n + FragmentD::column(e);
      const Element* from =
          bias + static_cast<int64_t>(query < in.S ? query : in.S - 1) * in.N;  // [N]
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {  // the lane's columns: tile m = i / 2, half i % 2
        const int key = column + tile_row(i / 2, i % 2) - in.P;
        const int inside = key < 0 ? 0 : (key < in.N ? key : in.N - 1);
        scores[i / 2][n].r[i % 2 * 2 + e] += to_float(from[inside]) * kLog2e;
      }
    }
  }
}

// Turns products into scores, with columns as rows: what score_by_rows does, for the columns of one
// warp, which all take the same factor. Columns that are hidden from all rows or not the block's
// get numbers, too: what is summed for them goes to no other column and is not stored.
template <class T, int kTilesM, int kTilesN>
__device__ __forceinline__ void score_by_columns(const CudaInputs& in, const Head& head,
                                                 bool is_prefix, float gate,
                                                 FragmentD (&scores)[kTilesM][kTilesN], int column,
                                                 int row) {
  const float factor =
      in.scale * kLog2e * gate;  // to units of log 2; the gate is 1 for own columns
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n].r[i] *= factor;
    }
  }
  if (is_prefix) return;  // no bias, and not under the causal diagonal
  if (in.has_bias()) {
    const int64_t bias_offset = head.b * in.bias_batch_stride + head.h * in.bias_head_stride;
    if (in.is_float32[kBias]) {
      add_bias_by_columns<float>(in, bias_offset, scores, column, row);
    } else {
      add_bias_by_columns<T>(in, bias_offset, scores, column, row);
    }
  }
  // Whether the causal diagonal crosses this tile; if not, all is seen.
  if (!in.is_causal || column + 16 * kTilesM <= causal_limit(in, row)) return;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The first query that sees the column, from the lane's first one on.
      const int first =
          column + tile_row(m, half) - in.P + in.S - in.N - row - FragmentD::column(0);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // The lane's queries are 8 n + e behind its first one.
          float& value = scores[m][n].r[2 * half + e];
          value = 8 * n + e >= first ? value : kMinusInfinity;
        }
      }
    }
  }
}

// Turns scores, times a factor, and dP^T into P^T and dS^T, in their places, where neither gate nor
// dropout is in them: the left operands of dV and dK. lse and D are of the lane's first queries.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void differentiate(float factor, FragmentD (&scores)[kTilesM][kTilesN],
                                              FragmentD (&dp)[kTilesM][kTilesN], const float* s_lse,
                                              const float* s_delta) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const Float2 lse = load_pair(s_lse + 8 * n), delta = load_pair(s_delta + 8 * n);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // columns of these fragments are queries
        const float of_row = i % 2 == 0 ? lse.low : lse.high;
        const float probability = exp2_approx(fmaf(scores[m][n].r[i], factor, -of_row));
        scores[m][n].r[i] = probability;
        dp[m][n].r[i] = probability * (dp[m][n].r[i] - (i % 2 == 0 ? delta.low : delta.high));
      }
    }
  }
}

// The same with gate and dropout: dropout g P^T and g dS^T. Where p has to be 0 lse is +inf or the
// score -inf, so 2^(score - lse) is 0.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void differentiate_gated(const CudaInputs& in, const Head& head,
                                                    float gate,
                                                    FragmentD (&scores)[kTilesM][kTilesN],
                                                    FragmentD (&dp)[kTilesM][kTilesN],
                                                    const float* s_lse, const float* s_delta,
                                                    int column, int row) {
  static_assert(kTilesN == 2, "dropout's bits are those of 16 queries");
  // A bit for each element: one call of Philox gives four, so they are drawn before the loops.
  uint32_t kept[kTilesM] = {};
  if (in.dropout.is_active()) {
    const DropoutRows rows = DropoutRows::of(in, head);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) kept[m] = kept_by_columns(in, rows, column + 16 * m, row);
  }
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const Float2 lse = load_pair(s_lse + 8 * n), delta = load_pair(s_delta + 8 * n);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // A query that does not exist is a row of zeros, whose product with an infinite key is NaN;
        // its lse is +inf.
        const float of_row = i % 2 == 0 ? lse.low : lse.high;
        const float probability =
            of_row == INFINITY ? 0.0f : exp2_approx(scores[m][n].r[i] - of_row);
        // What multiplies the probability before the value: the gate, and dropout's factor or 0.
        float factor = gate;
        if (in.dropout.is_active()) {
          const bool is_kept = (kept[m] >> kept_bit_by_columns(n, i) & 1u) != 0;
          factor = is_kept ? in.dropout.keep_scale * gate : 0.0f;
        }
        scores[m][n].r[i] = probability * factor;
        // The last gate is the key's: dk is the gradient of the key before it is gated.
        const float of_delta = i % 2 == 0 ? delta.low : delta.high;
        dp[m][n].r[i] = probability * (dp[m][n].r[i] * factor - of_delta) * gate;
      }
    }
  }
}

// What a lane reads: the addresses that it passes to ldmatrix, of the warp's columns and of a
// buffer of queries, and its first query's lse and D.
struct Operands {
  uint32_t k;
  uint32_t v;
  uint32_t q;
  uint32_t q_transposed;
  uint32_t dout;
  uint32_t dout_transposed;
  const float* lse;
  const float* delta;
};

// One step of a warp: its columns, from `column` on, and kRowsOfStep queries from `row` on, which
// begin at row `step` of the buffer. Four products: S^T and dP^T, then dV and dK.
template <class C, bool kIsPrefix, int kRowsOfStep, bool kIsPlain, int kTilesM>
__device__ __forceinline__ void attend(const CudaInputs& in, const Walk& s_walk, int g,
                                       State<C, kTilesM>& state, const Operands& from, int step,
                                       int column, int row) {
  constexpr int kTilesN = kRowsOfStep / 8;
  column = opaque(column);  // else what follows from it would be kept in registers along the walk
  FragmentD dots[kTilesM][kTilesN], dp[kTilesM][kTilesN];  // S^T, then P^T; dP^T, then dS^T
  const uint32_t offset = step * C::kStride * 2;
  multiply_rows<C>(dots, from_zero, operands_of<C, C::kKeepsKeys>(state.k, from.k),
                   from.q + offset);
  multiply_rows<C>(dp, from_zero, operands_of<C, C::kKeepsKeys>(state.v, from.v),
                   from.dout + offset);
  if constexpr (kIsPlain) {
    differentiate(in.scale * kLog2e, dots, dp, from.lse + step, from.delta + step);
  } else {
    // For dropout's rows and the gate, which change with the walk.
    const Head head = {s_walk.b, s_walk.h, g};
    const float gate = kIsPrefix ? gate_of<typename C::T>(in, head) : 1.0f;
    score_by_columns<typename C::T>(in, head, kIsPrefix, gate, dots, column, row);
    differentiate_gated(in, head, gate, dots, dp, from.lse + step, from.delta + step, column, row);
  }
  accumulate_rows<C>(state.dv, dots, from.dout_transposed + offset);
  accumulate_rows<C>(state.dk, dp, from.q_transposed + offset);
}

// Is nothing to be done to the scores of a warp's columns and kPlainStep queries from `row` on but
// to multiply them by a factor, and nothing to the probabilities?
template <class W>
__device__ __forceinline__ bool is_plain_step(const CudaInputs& in, int column, int row) {
  return row + kPlainStep <= in.S && !in.has_bias() && !in.dropout.is_active() &&
         (!in.is_causal || column + W::kColumns <= causal_limit(in, row));
}

// All steps of a warp in a tile of queries, which begins at `first_row`.
template <class C, bool kIsPrefix, int kTilesM>
__device__ __forceinline__ void attend_to_tile(const CudaInputs& in, const Walk& s_walk, int g,
                                               State<C, kTilesM>& state, const Operands& from,
                                               int column, int first_row) {
  using W = Warps<C, kIsPrefix>;
  int step = W::group() * W::kRows;
  const int end = step + W::kRows;
#pragma unroll 1
  while (step < end) {
    const int row = first_row + step;
    if (!kIsPrefix && end - step >= kPlainStep && is_plain_step<W>(in, column, row)) {
      attend<C, kIsPrefix, kPlainStep, true>(in, s_walk, g, state, from, step, column, row);
      step += kPlainStep;
      continue;
    }
    // Behind the last query, or the last of these queries sees none of the warp's columns.
    if (row < in.S && column < row_limit(in, row + kGeneralStep - 1, in.P + in.N)) {
      attend<C, kIsPrefix, kGeneralStep, false>(in, s_walk, g, state, from, step, column, row);
    }
    step += kGeneralStep;
  }
}

// Adds the four warps' sums of a prefix tile in their order, and writes them to the workspace, to
// the [A_i, P_i, G, E] of the block's chunk. The whole block takes part.
template <class C>
__device__ __forceinline__ void store_partial(Shared<C>& s, const CudaInputs& in, float* partial,
                                              float factor, const FragmentD (&sums)[1][C::kE / 8]) {
  constexpr int kSize = kPrefixTile * C::kE;
  static_assert(sizeof(float) * kWarps * kSize <= sizeof(s.q) + sizeof(s.dout),
                "the sums of the warps fit where queries were");
  float* s_sums = reinterpret_cast<float*>(s.q[0]);  // [kWarps, kPrefixTile, E]
  // Every warp has read the queries, or of the call before the sums, that lie where sums go now.
  sync_threads();
#pragma unroll
  for (int n = 0; n < C::kE / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s_sums[warp_index() * kSize + tile_row(0, i / 2) * C::kE + 8 * n + FragmentD::column(i)] =
          sums[0][n].r[i];
    }
  }
  sync_threads();  // all four warps' sums are written before any thread adds them
  if (partial == nullptr) return;
  const Columns& columns = s.columns;
  const int prefix = columns.prefix;
  // The first row of the chunk's and member's [P_i, G, E].
  const int64_t row =
      (static_cast<int64_t>(columns.chunk) * in.A_i[prefix] + columns.member) * in.P_i[prefix];
  for (int i = thread_index(); i < kSize; i += kThreads) {
    const int column = columns.first + i / C::kE;
    if (column < columns.begin || column >= columns.end) continue;  // another prefix's column
    float sum = 0.0f;                                               // in the order of the warps
    for (int w = 0; w < kWarps; ++w) sum += s_sums[w * kSize + i];
    partial[((row + column - in.first[prefix]) * in.G + columns.g) * C::kE + i % C::kE] =
        sum * factor;
  }
}

// Where two warps have the same own columns and different queries, they exchange halves of their
// sums: the first one then has all of dk, the second one all of dv. A lane's partner is the same
// lane of the other warp. The whole block takes part.
template <class C, int kTilesM>
__device__ __forceinline__ void exchange_sums(Shared<C>& s, State<C, kTilesM>& state) {
  using W = Warps<C, false>;
  constexpr int kSums = kTilesM * C::kE / 2;  // of dk, or of dv, in a lane
  static_assert(W::kGroups == 2, "the sums of two warps are added");
  static_assert(sizeof(float) * kThreads * kSums <= sizeof(s.q) + sizeof(s.dout),
                "the sums of the warps fit where queries were");
  float* s_sums = reinterpret_cast<float*>(s.q[0]);  // [kWarps, kSums, 32]
  const auto for_each_sum = [&](auto&& visit) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int m = i / (C::kE / 2), n = i % (C::kE / 2) / 4;
      visit(i * 32, state.dk[m][n].r[i % 4], state.dv[m][n].r[i % 4]);
    }
  };
  const bool is_first = W::group() == 0;
  float* mine = s_sums + warp_index() * kSums * 32 + lane_index();
  const float* partners = s_sums + (warp_index() ^ 1) * kSums * 32 + lane_index();
  sync_threads();  // every warp has read the queries that lie where sums go now
  for_each_sum([&](int i, float dk, float dv) { mine[i] = is_first ? dv : dk; });
  sync_threads();  // the partner's sums are there before they are added
  for_each_sum([&](int i, float& dk, float& dv) { (is_first ? dk : dv) += partners[i]; });
}

// Rounds a warp's dk or dv of own columns and writes it; s_rows is a place of its own. No other
// block adds to it.
template <class C, int kTilesM>
__device__ __forceinline__ void store_own(const CudaInputs& in, const Columns& columns, int b,
                                          int column, Input tensor, typename C::T* s_rows,
                                          FragmentD (&sums)[kTilesM][C::kE / 8], float factor) {
  using T = typename C::T;
  if (in.grad[tensor] == nullptr) return;
  // A tile's first columns may be the prefix's, and its last ones may lie behind the last key.
  const int begin = columns.begin > column ? columns.begin - column : 0;
  const int end = columns.end - column < 16 * kTilesM ? columns.end - column : 16 * kTilesM;
  const int64_t first = (static_cast<int64_t>(b) * in.G + columns.g) * in.N + column - in.P;
  const bool* mask = in.mask_of(b);
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = column + tile_row(m, half);
      // What was summed for a column that no query sees is not its gradient, which is 0.
      const bool is_seen =
          own >= columns.begin && own < columns.seen_end && (mask == nullptr || mask[own - in.P]);
      if (is_seen) continue;
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n)
        sums[m][n].r[2 * half] = sums[m][n].r[2 * half + 1] = 0.0f;
    }
  }
  put_rows<C>(s_rows, sums, factor);
  store_rows<C>(in.grad_as<T>(tensor) + first * C::kE, s_rows, begin, end);
}

// Writes dk and dv of own columns. The whole block takes part.
template <class C, int kTilesM>
__device__ __forceinline__ void finish_own(const CudaInputs& in, Shared<C>& s, int b,
                                           State<C, kTilesM>& state) {
  using W = Warps<C, false>;
  const int column = s.columns.first + W::column();
  bool has_dk = true, has_dv = true;
  if constexpr (W::kGroups == 2) {
    exchange_sums(s, state);
    has_dk = W::group() == 0, has_dv = !has_dk;
  } else {
    sync_threads();  // the other warps have read the queries and keys that lie where dk and dv go
  }
  // Two warps with the same columns had the same keys; the barriers have shown that they are read.
  constexpr bool kInKeys = W::kGroups == 2;
  typename C::T* s_dk = (kInKeys ? keys_of(s) : s.q[0]) + W::column() * C::kStride;
  typename C::T* s_dv = (kInKeys ? values_of(s) : s.dout[0]) + W::column() * C::kStride;
  // S = scale Q K^T, so dK has the scale once more.
  if (has_dk) store_own<C>(in, s.columns, b, column, kK, s_dk, state.dk, in.scale);
  if (has_dv) store_own<C>(in, s.columns, b, column, kV, s_dv, state.dv, 1.0f);
}

// The block's walk: sums what its warps' columns get from all queries, in `state`.
template <class C, bool kIsPrefix, int kTilesM>
__device__ __forceinline__ void walk_queries(const BackwardParams& p, Shared<C>& s,
                                             State<C, kTilesM>& state) {
  using W = Warps<C, kIsPrefix>;
  const CudaInputs& in = p.in;
  const int column = s.columns.first + W::column();
  // Keys and the first tile of queries are one group of copies; every later tile is one.
  stage_keys<C>(s, in, s.walk[0].b);
  stage_queries<C>(s, p, s.walk[0], 0);
  cp_async_commit();
  const uint32_t k_of_lane =
      lane_address_of_a(keys_of<C>(s) + W::column() * C::kStride, C::kStride);
  const uint32_t v_of_lane =
      lane_address_of_a(values_of<C>(s) + W::column() * C::kStride, C::kStride);
  int buffer = 0;
  bool is_last = false;
  [[maybe_unused]] bool is_first = true;
#pragma unroll 1
  while (!is_last) {
    const Operands from = {
        k_of_lane,
        v_of_lane,
        lane_address_of_b_pair(s.q[buffer], C::kStride),
        lane_address_of_b_pair_transposed(s.q[buffer], C::kStride),
        lane_address_of_b_pair(s.dout[buffer], C::kStride),
        lane_address_of_b_pair_transposed(s.dout[buffer], C::kStride),
        s.lse[buffer] + FragmentD::column(0),
        s.delta[buffer] + FragmentD::column(0),
    };
    cp_async_wait<0>();
    // The tile and its walk are there, every thread's copies included, and every warp is done with
    // the last tile, whose buffer is filled next.
    sync_threads();
    if constexpr (C::kKeepsKeys) {
      if (is_first) {
        load_operands<C>(state.k, from.k);
        load_operands<C>(state.v, from.v);
        sync_threads();  // every warp has its keys before the second tile is staged over them
      }
      is_first = false;
    }
    // The next tile comes while this one is worked on.
    const Walk next = advanced(in, s.columns, s.range, s.walk[buffer]);
    is_last = next.b >= s.range.b_end;
    if (!is_last) {
      stage_queries<C>(s, p, next, 1 - buffer);
      cp_async_commit();
    }
    // Nobody reads this entry before the next barrier.
    if (thread_index() == 0) s.walk[1 - buffer] = next;
    attend_to_tile<C, kIsPrefix>(in, s.walk[buffer], s.columns.g, state, from, column,
                                 s.walk[buffer].tile * kRowTile);
    buffer = 1 - buffer;
  }
  cp_async_wait<0>();
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    prefix_attention_bwd_keys_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  place_block(p, s.columns, s.range, s.walk[0], s.scratch);
  const bool has_walk = s.walk[0].b < s.range.b_end;  // else all gradients of the tile are zeros
  if (s.columns.prefix >= 0) {
    State<C, 1> state;
    if (has_walk) walk_queries<C, true>(p, s, state);
    // dv is complete, and dk still lacks the scale.
    store_partial<C>(s, p.in, p.prefix[s.columns.prefix].partial_k, p.in.scale, state.dk);
    store_partial<C>(s, p.in, p.prefix[s.columns.prefix].partial_v, 1.0f, state.dv);
  } else {
    State<C, C::kOwnTilesM> state;
    if (has_walk) walk_queries<C, false>(p, s, state);
    finish_own<C>(p.in, s, s.range.b_end - 1, state);
  }
}

}  // namespace

void launch_bwd_keys_sm80(const BackwardParams& p) {
  const int blocks = p.prefix_blocks + p.in.B * p.in.G * p.own_tiles;
  run_fitting<Config>("prefix_attention_bwd_keys_sm80", p.in, [&](auto tag, const char* name) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{blocks, 1, 1, kThreads, sizeof(Shared<C>)};
    launch<prefix_attention_bwd_keys_sm80<C>>(name, shape, p.in.stream, p);
  });
}

}  // namespace pelt::prefix_attention
