// prefix_attention, forward, one launch:
//   out = softmax([g scale Q Pk^T ; scale Q K^T + bias + mask]) [g Pv ; V]
//
// A block of 4 warps takes 128 queries of one head, a warp 32 of them, and walks the joined axis of
// prefix and own columns:
//
//        Q [128, E]     | prefix 0 | prefix 1 | K, V ...            |
//        |########|  x  |    tile    |    tile    |    tile    | -- |  --> out [128, E], lse [128]
//
// Every row of a tile is fetched from where it lies, so prefixes are neither copied nor expanded,
// and they cost what their columns cost, not a tile of their own. Two buffers of kColumns columns:
// cp.async fills one while the warps work on the other, with one barrier for each tile. What is
// seen of a tile's columns are bits, made by ballot one tile before it is staged (Seen), and what
// their products start from, 0 or -inf (Start): the inner loop has no mask. A warp works on as many
// columns as registers allow and stops at the last one it sees, so that padding, the causal
// triangle and a short tail cost no products. Up to 32 queries, as in decoding, are taken by all
// four warps: each takes a quarter of a tile's columns, and their results are merged at the end.
//
// The gate is a factor of a score (instead of the prefix's key) and of a probability (instead of
// its value). Scores are in units of log 2, and the scale is a factor in their exponent. Softmax is
// online, in float32: a row keeps what its exponents are counted from, its base, and its own part of
// the sum of 2^(score - base), which four lanes add up at the end. Bases are raised, and
// accumulators rescaled, only when a score of the warp is more than kSlack above its row's base,
// which is rare after the first step; no lane needs the maximum of another one before.
//
// In the composed form flash attention has already attended to K and V, and a row continues from
// its result: its output is the accumulator, its log-sum-exp the base, and the sum is 1.
//
// Tiles are padded by 16 bytes for each row, to an odd number of 16-byte units: the rows of an
// ldmatrix fall into different banks, and all its addresses are one register and a constant, which
// a swizzle would not give. Shared memory per block, E = 32, 64, 96, 128: 32, 56, 81, 70 KB.
#include <cstddef>

#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 2;  // [16, 16] tiles of queries that a warp holds
constexpr int kWarpRows = 16 * kTilesM;
constexpr int kRows = kWarps * kWarpRows;
// Columns that a warp works on at a time: many where nothing has to be done to scores but to hide
// columns (kPlainStep), fewer in general, for which the registers suffice, and 16 at the end or
// where the warps split a tile's columns.
constexpr int kGeneralStep = 32;
constexpr int kShortStep = 16;
// How far a score may exceed what its row's exponents are counted from, in units of log 2: then
// probabilities are at most 16 before they are divided by their sum, which float16 has, too, with
// gates up to 4000.
constexpr float kSlack = 4.0f;
// What exponents are counted from while a row has seen nothing: every finite score is at least as
// high, and no difference with it is a NaN, as -inf - (-inf) would be.
constexpr float kLowest = -3.402823466e38f;

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  // Wider heads take fewer columns, so that two blocks still fit on a multiprocessor.
  static constexpr int kColumns = kE <= 96 ? 64 : 32;
  static constexpr int kPlainStep = kE <= 32 ? 32 : kColumns;
  static_assert(kColumns % kPlainStep == 0, "a plain step does not leave the buffer");
  // Q stays in registers where there is room: a third less traffic from shared memory. Narrow heads
  // give the registers to a third block.
  static constexpr bool kKeepsQ = kE == 64;
  static constexpr int kMinBlocks = kE <= 32 ? 3 : 2;
  static_assert(kE % 32 == 0, "a row is a whole number of k steps and of vectors for four lanes");
};

template <class C>
struct Shared {
  alignas(16) typename C::T q[kRows * C::kStride];  // [kRows, E]; at the end out
  // Two buffers of [kColumns, E].
  alignas(16) typename C::T k[2][C::kColumns * C::kStride];
  alignas(16) typename C::T v[2][C::kColumns * C::kStride];
  Start starts[2][C::kColumns / 2];  // of the buffers' columns
  // Of the tiles with the buffers' numbers; each is made a tile before that is staged.
  Seen<C::kColumns> seen[2];
  // The same for all threads, and here instead of in registers, of which the accumulators leave
  // few.
  Scoring scoring;
  DropoutRows dropout_rows;
  ReadColumns read;
  Head head;
  int scratch[kWarps];
};

// What a warp carries along the columns. Index [m][half] is the lane's row tile_row(m, half).
template <class C>
struct State {
  FragmentD out[kTilesM][C::kE / 8];                  // sums of 2^(score - base) times values
  FragmentA q[kTilesM][C::kKeepsQ ? C::kE / 16 : 1];  // unused without kKeepsQ
  // A row's base, negated: what its exponents are counted from, about the largest score so far.
  float minus_base[kTilesM][2];
  float sum[kTilesM][2];  // of 2^(score - base), over this lane's columns only
};

// Sets rows to where they begin: nothing attended to yet, or, if `continues`, all own columns by
// another attention. Four lanes hold parts of a row's sum; the first one gets the 1, the others 0.
template <class C>
__device__ __forceinline__ void start_rows(const ForwardParams& p, const Head& head,
                                           State<C>& state, int row, bool continues) {
  const float* own_lse = p.own_lse + head.b * p.in.stride[kV][0] + head.h * p.in.stride[kV][1];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.minus_base[m][half] = -kLowest;
      state.sum[m][half] = 0.0f;
      const int query = row + tile_row(m, half);
      if (!continues || query >= p.in.S) continue;
      const float lse = own_lse[query];
      // A row that saw no own column has lse = -inf: its sum stays 0, as if nothing had been done.
      if (lse == kMinusInfinity) continue;
      state.minus_base[m][half] = -lse * kLog2e;
      state.sum[m][half] = lane_index() % 4 == 0 ? 1.0f : 0.0f;
    }
  }
  if (!continues) return;
  const auto* own_out = head_rows<typename C::T>(p.in, kK, head.b, head.h);
  const int64_t stride = row_stride(p.in, kK);
  add_rows<C>(state.out, own_out + row * stride, stride, p.in.S - row);
}

// Raises every row's base to its largest score, which is `factor` times that of `largest` over the
// row's lanes, and rescales what has been summed.
template <class C>
__device__ __forceinline__ void raise_bases(State<C>& state, float factor,
                                            const float (&largest)[kTilesM][2]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows of the warp's tile are spread over groups of four lanes.
      float maximum = fmaxf(largest[m][half], shfl_xor(largest[m][half], 1));
      maximum = fmaxf(maximum, shfl_xor(maximum, 2));
      const float before = -state.minus_base[m][half], base = fmaxf(maximum * factor, before);
      const float shrink = exp2_approx(before - base);  // 0 where nothing has been seen before
      state.minus_base[m][half] = -base;
      state.sum[m][half] *= shrink;
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        state.out[m][n].r[2 * half] *= shrink;
        state.out[m][n].r[2 * half + 1] *= shrink;
      }
    }
  }
}

// Turns scores, times a positive factor, into probabilities up to the factor 2^base, and adds them
// to the rows' sums.
template <class C, int kTilesN>
__device__ __forceinline__ void exponentiate(State<C>& state, float factor,
                                             FragmentD (&scores)[kTilesM][kTilesN]) {
  float largest[kTilesM][2];  // of the lane's columns
  bool is_higher = false;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& most = largest[m][half];
      most = kMinusInfinity;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        most = fmaxf(most, fmaxf(scores[m][n].r[2 * half], scores[m][n].r[2 * half + 1]));
      }
      is_higher |= fmaf(most, factor, state.minus_base[m][half]) > kSlack;
    }
  }
  // One branch for the warp. A score that is only a little higher than its row's base is no reason:
  // after a row's first columns hardly any step does this.
  if (vote_any(is_higher)) raise_bases(state, factor, largest);
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // elements 0 and 1 are of the row of half 0, 2 and 3 of half 1
        float& score = scores[m][n].r[i];
        score = exp2_approx(fmaf(score, factor, state.minus_base[m][i / 2]));
        state.sum[m][i / 2] += score;
      }
    }
  }
}

// Multiplies probabilities by what belongs to the values: the gate of prefix columns, and dropout's
// zeros. It comes after the sums, which neither of them changes; dropout's factor for what it keeps
// is the same everywhere and waits for the end.
template <int kTilesN>
__device__ __forceinline__ void weigh_columns(const CudaInputs& in, const Scoring& scoring,
                                              const DropoutRows& rows,
                                              FragmentD (&p)[kTilesM][kTilesN], int row,
                                              int column) {
  if (in.has_gate() && column < in.P) {  // behind the prefix there is nothing to gate
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        // A step may begin in the prefix and end behind it.
        const float gate = column + 8 * n + FragmentD::column(i) < in.P ? scoring.gate : 1.0f;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) p[m][n].r[i] *= gate;
      }
    }
  }
  if (!in.dropout.is_active()) return;
  constexpr int kPart = kTilesN < 4 ? kTilesN : 4;  // fragments whose bits are one word
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int part = 0; part < kTilesN; part += kPart) {
      const uint32_t kept = kept_by_rows<kPart>(in, rows, row + 16 * m, column + 8 * part);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < kPart; ++n) {
          if ((kept >> kept_bit_by_rows(n, i) & 1u) == 0) p[m][part + n].r[i] = 0.0f;
        }
      }
    }
  }
}

// What a lane reads of a buffer: the addresses that it passes to ldmatrix, and its first pair's
// start.
struct Operands {
  uint32_t k;
  uint32_t v;
  const Start* start;
};

// One step of a warp: products, scores, probabilities and the second product for kColumnsOfStep
// columns from `column` on, which are row `step` and the following ones of the buffer. In a plain
// step scores have one factor and probabilities none.
template <class C, int kColumnsOfStep, bool kIsPlain>
__device__ __forceinline__ void attend(const CudaInputs& in, const Shared<C>& s, State<C>& state,
                                       uint32_t q_of_lane, const Operands& from, int step, int row,
                                       int column) {
  constexpr int kTilesN = kColumnsOfStep / 8;
  const uint32_t offset = step * C::kStride * 2;
  const Start* start = from.start + step / 2;
  const auto start_of_columns = [&](int n) { return start_of(start[4 * n]); };
  FragmentD p[kTilesM][kTilesN];  // products, then scores, then probabilities
  multiply_rows<C>(p, start_of_columns, operands_of<C, C::kKeepsQ>(state.q, q_of_lane),
                   from.k + offset);
  float factor = in.scale * kLog2e;
  if constexpr (!kIsPlain) {
    factor = score_by_rows<typename C::T>(in, s.scoring, s.scoring.prefix_factor, p,
                                          start_of_columns, row, column);
  }
  exponentiate(state, factor, p);
  if constexpr (!kIsPlain) weigh_columns(in, s.scoring, s.dropout_rows, p, row, column);
  accumulate_rows<C>(state.out, p, from.v + offset);
}

// All steps of a warp in a buffer of columns from `column` on: rows [step, end) of the buffer.
template <class C>
__device__ __forceinline__ void attend_to_tile(const CudaInputs& in, const Shared<C>& s,
                                               State<C>& state, uint32_t q_of_lane,
                                               const Operands& from, int row, int column, int step,
                                               int end) {
#pragma unroll 1
  while (step < end) {
    const int left = end - step, first = column + step;
    if (left > C::kPlainStep - kShortStep && is_plain(in, row, first, C::kPlainStep)) {
      attend<C, C::kPlainStep, true>(in, s, state, q_of_lane, from, step, row, first);
      step += C::kPlainStep;
    } else if (left > kShortStep) {
      attend<C, kGeneralStep, false>(in, s, state, q_of_lane, from, step, row, first);
      step += kGeneralStep;
    } else {
      attend<C, kShortStep, false>(in, s, state, q_of_lane, from, step, row, first);
      step += kShortStep;
    }
  }
}

// Leaves nothing of what rows that see nothing have summed.
template <class C>
__device__ __forceinline__ void clear_unseeing_rows(const CudaInputs& in, int b, State<C>& state,
                                                    int row) {
  if (!in.is_causal || in.mask_of(b) == nullptr) return;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + tile_row(m, half);
      if (query >= in.S || !sees_nothing(in, b, query)) continue;
      state.sum[m][half] = 0.0f;
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        state.out[m][n].r[2 * half] = state.out[m][n].r[2 * half + 1] = 0.0f;
      }
    }
  }
}

// The log-sum-exp from a row's base, in units of log 2, and its sum. A sum of 0 means that the row
// saw nothing (a NaN is not 0), and gives -inf. A base of +inf stays +inf, as in the formula,
// though its probabilities are NaN.
__device__ __forceinline__ float log_sum_exp(float base, float sum) {
  if (sum == 0.0f) return kMinusInfinity;
  return base == -kMinusInfinity ? base : (base + log2_approx(sum)) * kLn2;
}

// Writes out = accumulators / sum, and lse. A row that saw nothing is 0 and its lse -inf.
template <class C>
__device__ __forceinline__ void finish_rows(const ForwardParams& p, const Head& head,
                                            State<C>& state, typename C::T* s_out, int row) {
  const CudaInputs& in = p.in;
  const int64_t first = head_index(in, head) * in.S + row;  // of lse, and of out's rows
  float* lse = in.output_as<float>(kLse);
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = group_sum<4>(state.sum[m][half]);  // the four lanes of a row
      const float factor = sum == 0.0f ? 0.0f : in.dropout.keep_scale * reciprocal_approx(sum);
      const int tile = tile_row(m, half);
      if (lane_index() % 4 == 0 && row + tile < in.S) {
        lse[first + tile] = log_sum_exp(-state.minus_base[m][half], sum);
      }
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        state.out[m][n].r[2 * half] *= factor;
        state.out[m][n].r[2 * half + 1] *= factor;
      }
    }
  }
  // No other warp reads these rows of s.q, so the warp's own order in put_rows suffices.
  put_rows<C>(s_out, state.out, 1.0f);
  store_rows<C>(in.output_as<typename C::T>(kOut) + first * C::kE, s_out, 0,
                row + kWarpRows < in.S ? kWarpRows : in.S - row);
}

// The same where the four warps took different columns of the same queries: they write
// accumulators, maxima and sums to shared memory, and every thread merges some elements of all
// four. The order is that of the warps, so the bits do not depend on which of them is first.
template <class C>
__device__ __forceinline__ void merge_warps(const ForwardParams& p, Shared<C>& s, const Head& head,
                                            State<C>& state, int row) {
  constexpr int kSize = kWarpRows * C::kE;
  static_assert(sizeof(float) * kWarps * (kSize + 2 * kWarpRows) <= offsetof(Shared<C>, scoring),
                "the results of four warps fit where queries and columns were");
  using T = typename C::T;
  const CudaInputs& in = p.in;
  // Queries and columns are not needed any more; the barrier after the walk said so.
  float* s_out = reinterpret_cast<float*>(s.q);  // [kWarps, kWarpRows, E]
  float* s_base = s_out + kWarps * kSize;        // [kWarps, kWarpRows]
  float* s_sum = s_base + kWarps * kWarpRows;    // [kWarps, kWarpRows]
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = warp_index() * kWarpRows + tile_row(m, half);
      const float sum = group_sum<4>(state.sum[m][half]);
      if (lane_index() % 4 == 0) {
        s_base[to] = -state.minus_base[m][half];
        s_sum[to] = sum;
      }
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        const int element = to * C::kE + 8 * n + FragmentD::column(0);
        s_out[element] = state.out[m][n].r[2 * half];
        s_out[element + 1] = state.out[m][n].r[2 * half + 1];
      }
    }
  }
  sync_threads();  // all four warps' results are written before any thread reads them
  const int64_t first = head_index(in, head) * in.S + row;
  float* lse = in.output_as<float>(kLse);
  // A thread takes eight elements of a query, and brings the warps' parts to one maximum.
  for (int i = thread_index(); i < (in.S - row) * C::kVectors; i += kThreads) {
    const int query = i / C::kVectors, e = i % C::kVectors * 8;
    float base = kLowest, sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) base = fmaxf(base, s_base[w * kWarpRows + query]);
    Float8 out = {};
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = exp2_approx(s_base[w * kWarpRows + query] - base);
      sum += s_sum[w * kWarpRows + query] * shrink;
      for (int j = 0; j < 8; ++j) {
        out.v[j] += s_out[(w * kWarpRows + query) * C::kE + e + j] * shrink;
      }
    }
    const float factor = sum == 0.0f ? 0.0f : in.dropout.keep_scale * reciprocal_approx(sum);
    for (int j = 0; j < 8; ++j) out.v[j] *= factor;
    store_16(in.output_as<T>(kOut) + (first + query) * C::kE + e, narrow<T>(out));
    if (e == 0) lse[first + query] = log_sum_exp(base, sum);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    prefix_attention_fwd_sm80(const __grid_constant__ ForwardParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared<C>>();
  const CudaInputs& in = p.in;
  const int row_tiles = (in.S + kRows - 1) / kRows;
  const Head head = head_of(in, block_index_x() / row_tiles);
  // Under a causal mask the last rows see the most columns: their blocks start first, so that no
  // long block is left over at the end of the grid.
  const int first_row = (row_tiles - 1 - block_index_x() % row_tiles) * kRows;
  // Few queries (decoding, the end of a sequence): all four warps take the same ones, and split the
  // columns of each tile among them.
  const bool splits_columns = in.S - first_row <= kWarpRows;
  const int warp_row = splits_columns ? 0 : warp_index() * kWarpRows, row = first_row + warp_row;

  stage_rows<C, kRows>(s.q, head_rows<T>(in, kQ, head.b, head.h), row_stride(in, kQ), first_row,
                       in.S);
  // Written while the copies are under way, and there behind the barrier of seen_end_of: what is
  // the same for all threads, and what is seen of the first two tiles.
  const ReadColumns read(in, head.b);
  see_tiles<C::kColumns>(in, read, s.seen);
  if (thread_index() == 0) {
    s.scoring = scoring_of<T>(in, head);
    s.dropout_rows = DropoutRows::of(in, head);
    s.read = read;
    s.head = head;
  }
  // Three ends: of the columns that the sample sees, that any row of the block sees, and that any
  // row of the warp sees. The block stages tiles up to the second, a warp multiplies up to the
  // third.
  const int seen_end = seen_end_of(in, head.b, s.scratch);
  const int end =
      row_limit(in, first_row + kRows - 1 < in.S ? first_row + kRows - 1 : in.S - 1, seen_end);
  const int last_row = row + kWarpRows < in.S ? row + kWarpRows - 1 : in.S - 1;
  const int warp_end = row < in.S ? row_limit(in, last_row, seen_end) : 0;
  stage_columns<C, C::kColumns>(s.k[0], s.v[0], in, head, 0, s.seen[0]);
  write_starts<C::kColumns>(s.starts[0], s.seen[0]);
  cp_async_commit();

  State<C> state;
  // Of warps with the same queries only the first continues from the other attention's result,
  // which would be counted four times otherwise.
  start_rows<C>(p, head, state, row, p.own_out != nullptr && !(splits_columns && warp_index() > 0));
  T* s_q = s.q + warp_row * C::kStride;
  const uint32_t q_of_lane = lane_address_of_a(s_q, C::kStride);
  int buffer = 0;  // the one that holds the columns from `column` on
#pragma unroll 1
  for (int column = 0; column < end; column += C::kColumns) {
    cp_async_wait<0>();
    // The tile is there, every thread's copies included, and every warp is done with the last one,
    // whose buffer is filled next.
    sync_threads();
    if constexpr (C::kKeepsQ) {
      if (column == 0) load_operands<C>(state.q, q_of_lane);
    }
    const int next = column + C::kColumns;
    if (next < end) {
      stage_columns<C, C::kColumns>(s.k[1 - buffer], s.v[1 - buffer], in, s.head, next,
                                    s.seen[1 - buffer]);
      write_starts<C::kColumns>(s.starts[1 - buffer], s.seen[1 - buffer]);
      cp_async_commit();
    }
    // Of the tile after the next one the mask is read now, and used behind the products.
    const bool sees_tile = thread_index() < C::kColumns && next + C::kColumns < end;
    const bool is_seen =
        sees_tile && is_column_seen(in, s.read, next + C::kColumns + thread_index());
    const Operands operands = {
        lane_address_of_b_pair(s.k[buffer], C::kStride),
        lane_address_of_b_pair_transposed(s.v[buffer], C::kStride),
        s.starts[buffer] + lane_index() % 4,
    };
    const int columns = warp_end - column < C::kColumns ? warp_end - column : C::kColumns;
    // Of 32 columns two of the warps that split them get none.
    const int step = splits_columns ? warp_index() * kShortStep : 0;
    const int step_end =
        splits_columns && step + kShortStep < columns ? step + kShortStep : columns;
    attend_to_tile<C>(in, s, state, q_of_lane, operands, row, column, step, step_end);
    if (sees_tile) write_seen(s.seen[buffer], is_seen);
    buffer = 1 - buffer;
  }
  // Results go where queries and columns were: every copy has landed (of a block whose rows see
  // nothing the first ones may still be under way), and every warp has read its operands.
  cp_async_wait<0>();
  sync_threads();
  clear_unseeing_rows<C>(in, s.head.b, state, row);
  if (splits_columns) {
    merge_warps<C>(p, s, s.head, state, row);
  } else if (row < in.S) {
    finish_rows<C>(p, s.head, state, s_q, row);
  }
}

}  // namespace

void launch_fwd_sm80(const ForwardParams& p) {
  const int blocks = p.in.B * p.in.H * ((p.in.S + kRows - 1) / kRows);
  run_fitting<Config>("prefix_attention_fwd_sm80", p.in, [&](auto tag, const char* name) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{blocks, 1, 1, kThreads, sizeof(Shared<C>)};
    launch<prefix_attention_fwd_sm80<C>>(name, shape, p.in.stream, p);
  });
}

}  // namespace pelt::prefix_attention
