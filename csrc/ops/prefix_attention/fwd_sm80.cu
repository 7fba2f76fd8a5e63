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
// cp.async fills one while the warps work on the other, with one barrier for each tile. A warp
// works on kStep columns at a time and stops at the last one it sees, so that padding, the causal
// triangle and a short tail cost no products. Up to 32 queries, as in decoding, are taken by all
// four warps: each takes a quarter of a tile's columns, and their results are merged at the end.
//
// The gate is a factor of a score (instead of the prefix's key) and of a probability (instead of
// its value). Scores are in units of log 2. Softmax is online, in float32: a row keeps its maximum
// m and its own part of the sum of 2^(score - m), which four lanes add up at the end. While a row
// has seen nothing m is -inf, and 0 stands for it, since -inf - (-inf) would be NaN. The
// accumulators are rescaled only when a maximum of the warp has grown, which is rare after the
// first steps.
//
// In the composed form flash attention has already attended to K and V, and a row continues from
// its result: its output is the accumulator, its log-sum-exp the maximum, and the sum is 1.
//
// Tiles are padded by 16 bytes for each row, to an odd number of 16-byte units: the rows of an
// ldmatrix fall into different banks, and all its addresses are one register and a constant, which
// a swizzle would not give. Shared memory per block, E = 32, 64, 96, 128: 30, 55, 80, 70 KB.
#include <cstddef>

#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 2;  // [16, 16] tiles of queries that a warp holds
constexpr int kWarpRows = 16 * kTilesM;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kStep = 32;       // columns that a warp works on at a time
constexpr int kSplitStep = 16;  // the same where the warps split a tile's columns: a quarter of 64

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  // Wider heads take fewer columns, so that two blocks still fit on a multiprocessor.
  static constexpr int kColumns = kE <= 96 ? 64 : 32;
  // Q stays in registers where there is room: a third less traffic from shared memory.
  static constexpr bool kKeepsQ = kE <= 64;
  static constexpr int kMinBlocks = kE <= 32 ? 3 : 2;
  static_assert(kE % 32 == 0, "a row is a whole number of k steps and of vectors for four lanes");
};

template <class C>
struct Shared {
  alignas(16) typename C::T q[kRows * C::kStride];  // [kRows, E]; at the end out
  // Two buffers of [kColumns, E].
  alignas(16) typename C::T k[2][C::kColumns * C::kStride];
  alignas(16) typename C::T v[2][C::kColumns * C::kStride];
  // The same for all threads, and here instead of in registers, of which the accumulators leave
  // few.
  Scoring scoring;
  DropoutRows dropout_rows;
  int scratch[kWarps];
};

// What a warp carries along the columns. Index [m][half] is the lane's row tile_row(m, half).
template <class C>
struct State {
  FragmentD out[kTilesM][C::kE / 8];                  // sums of 2^(score - maximum) times values
  FragmentA q[kTilesM][C::kKeepsQ ? C::kE / 16 : 1];  // unused without kKeepsQ
  float maximum[kTilesM][2];                          // of the scores so far, in units of log 2
  float sum[kTilesM][2];  // of 2^(score - maximum), over this lane's columns only
};

// Brings the warp's queries into registers, for the whole walk along the columns.
template <class C>
__device__ __forceinline__ void load_operands(State<C>& state, const typename C::T* s_q) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int step = 0; step < C::kE / 16; ++step) {
      state.q[m][step] = load_a(s_q + 16 * m * C::kStride + 16 * step, C::kStride);
    }
  }
}

// The left operand of Q K^T: from registers, or without kKeepsQ each time from shared memory.
template <class C>
__device__ __forceinline__ FragmentA query_operand(const State<C>& state, const typename C::T* s_q,
                                                   int m, int step) {
  if constexpr (C::kKeepsQ) return state.q[m][step];
  return load_a(s_q + 16 * m * C::kStride + 16 * step, C::kStride);
}

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
      state.maximum[m][half] = kMinusInfinity;
      state.sum[m][half] = 0.0f;
      const int query = row + tile_row(m, half);
      if (!continues || query >= p.in.S) continue;
      const float lse = own_lse[query];
      // A row that saw no own column has lse = -inf: its sum stays 0, as if nothing had been done.
      state.maximum[m][half] = lse * kLog2e;
      state.sum[m][half] = lane_index() % 4 == 0 && lse != kMinusInfinity ? 1.0f : 0.0f;
    }
  }
  if (!continues) return;
  const auto* own_out = head_rows<typename C::T>(p.in, kK, head.b, head.h);
  const int64_t stride = row_stride(p.in, kK);
  add_rows<C>(state.out, own_out + row * stride, stride, p.in.S - row);
}

// Turns scores, times a positive factor, into probabilities up to the factor 2^maximum, and adds
// them to the rows' sums. Where a maximum grows, accumulators and sums are rescaled to it.
template <class C, int kTilesN>
__device__ __forceinline__ void exponentiate(State<C>& state, float factor,
                                             FragmentD (&scores)[kTilesM][kTilesN]) {
  float maximum[kTilesM][2];
  bool has_grown = false;
  // The new maxima. Rows of the warp's tile are spread over groups of four lanes.
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = kMinusInfinity;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        largest = fmaxf(largest, fmaxf(scores[m][n].r[2 * half], scores[m][n].r[2 * half + 1]));
      }
      largest = fmaxf(largest, shfl_xor(largest, 1));
      largest = fmaxf(largest, shfl_xor(largest, 2)) * factor;
      largest = fmaxf(largest, state.maximum[m][half]);
      maximum[m][half] = largest;
      has_grown |= largest > state.maximum[m][half];
    }
  }
  // One branch for the warp: most steps of a long row change no maximum and skip all of this.
  if (vote_any(has_grown)) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Of a row that has seen nothing, -inf - (-inf) would be NaN; with 0 the shrink is 0.
        const float base = maximum[m][half] == kMinusInfinity ? 0.0f : maximum[m][half];
        const float shrink = exp2_approx(state.maximum[m][half] - base);
        state.maximum[m][half] = maximum[m][half];
        state.sum[m][half] *= shrink;
#pragma unroll
        for (int n = 0; n < C::kE / 8; ++n) {
          state.out[m][n].r[2 * half] *= shrink;
          state.out[m][n].r[2 * half + 1] *= shrink;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // elements 0 and 1 are of the row of half 0, 2 and 3 of half 1
      const float largest = state.maximum[m][i / 2];
      const float base = largest == kMinusInfinity ? 0.0f : largest;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        scores[m][n].r[i] = exp2_approx(scores[m][n].r[i] * factor - base);
        state.sum[m][i / 2] += scores[m][n].r[i];
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
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    const uint32_t kept = kept_by_rows<kTilesN>(in, rows, row + 16 * m, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        if ((kept >> kept_bit_by_rows(n, i) & 1u) == 0) p[m][n].r[i] = 0.0f;
      }
    }
  }
}

// One step of a warp: products, scores, probabilities and the second product for kColumnsOfStep
// columns from `column` on, which are at s_k and s_v. `end` is where the sample's columns end.
template <class C, int kColumnsOfStep>
__device__ __forceinline__ void attend(const CudaInputs& in, const Scoring& scoring,
                                       const DropoutRows& rows, State<C>& state,
                                       const typename C::T* s_q, const typename C::T* s_k,
                                       const typename C::T* s_v, int row, int column, int end) {
  constexpr int kTilesN = kColumnsOfStep / 8;
  const uint32_t visible = visible_bits<2 * kTilesN>(in, scoring.key_mask, end, [&](int i) {
    return column + 8 * (i / 2) + FragmentD::column(i % 2);
  });
  FragmentD p[kTilesM][kTilesN];  // products, then scores, then probabilities
  multiply_rows<C>(p, [&](int m, int step) { return query_operand<C>(state, s_q, m, step); }, s_k);
  const float factor = score_by_rows<typename C::T>(in, scoring, scoring.prefix_factor, p, row,
                                                    column, end, visible);
  exponentiate(state, factor, p);
  weigh_columns(in, scoring, rows, p, row, column);
  accumulate_rows<C>(state.out, p, s_v);
}

// The log-sum-exp from a row's maximum, in units of log 2, and its sum. A sum of 0 means that the
// row saw nothing (a NaN is not 0), and gives -inf. A maximum of +inf stays +inf, as in the
// formula, though its probabilities are NaN.
__device__ __forceinline__ float log_sum_exp(float maximum, float sum) {
  return sum == 0.0f || maximum == -kMinusInfinity ? maximum : (maximum + log2f(sum)) * kLn2;
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
      const float factor = sum == 0.0f ? 0.0f : in.dropout.keep_scale / sum;
      const int tile = tile_row(m, half);
      if (lane_index() % 4 == 0 && row + tile < in.S) {
        lse[first + tile] = log_sum_exp(state.maximum[m][half], sum);
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
  float* s_out = reinterpret_cast<float*>(s.q);   // [kWarps, kWarpRows, E]
  float* s_maximum = s_out + kWarps * kSize;      // [kWarps, kWarpRows]
  float* s_sum = s_maximum + kWarps * kWarpRows;  // [kWarps, kWarpRows]
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = warp_index() * kWarpRows + tile_row(m, half);
      const float sum = group_sum<4>(state.sum[m][half]);
      if (lane_index() % 4 == 0) {
        s_maximum[to] = state.maximum[m][half];
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
    float maximum = kMinusInfinity, sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, s_maximum[w * kWarpRows + query]);
    const float base = maximum == kMinusInfinity ? 0.0f : maximum;
    Float8 out = {};
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = exp2_approx(s_maximum[w * kWarpRows + query] - base);
      sum += s_sum[w * kWarpRows + query] * shrink;
      for (int j = 0; j < 8; ++j) {
        out.v[j] += s_out[(w * kWarpRows + query) * C::kE + e + j] * shrink;
      }
    }
    const float factor = sum == 0.0f ? 0.0f : in.dropout.keep_scale / sum;
    for (int j = 0; j < 8; ++j) out.v[j] *= factor;
    store_16(in.output_as<T>(kOut) + (first + query) * C::kE + e, narrow<T>(out));
    if (e == 0) lse[first + query] = log_sum_exp(maximum, sum);
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
  stage_columns<C, C::kColumns>(s.k[0], s.v[0], in, head, 0);
  cp_async_commit();
  // Written while the copies are under way; the first barrier of the loop shows it to all threads.
  if (thread_index() == 0) {
    s.scoring = scoring_of<T>(in, head);
    s.dropout_rows = DropoutRows::of(in, head);
  }
  // Three ends: of the columns that the sample sees, that any row of the block sees, and that any
  // row of the warp sees. The block stages tiles up to the second, a warp multiplies up to the
  // third.
  const int seen_end = seen_end_of(in, head.b, s.scratch);
  const int end =
      row_limit(in, first_row + kRows - 1 < in.S ? first_row + kRows - 1 : in.S - 1, seen_end);
  const int last_row = row + kWarpRows < in.S ? row + kWarpRows - 1 : in.S - 1;
  const int warp_end = row < in.S ? row_limit(in, last_row, seen_end) : 0;

  State<C> state;
  // Of warps with the same queries only the first continues from the other attention's result,
  // which would be counted four times otherwise.
  start_rows<C>(p, head, state, row, p.own_out != nullptr && !(splits_columns && warp_index() > 0));
  T* s_q = s.q + warp_row * C::kStride;
  int buffer = 0;  // the one that holds the columns from `column` on
#pragma unroll 1
  for (int column = 0; column < end; column += C::kColumns) {
    cp_async_wait<0>();
    // The tile is there, every thread's copies included, and every warp is done with the last one,
    // whose buffer is filled next.
    sync_threads();
    if constexpr (C::kKeepsQ) {
      if (column == 0) load_operands<C>(state, s_q);
    }
    if (column + C::kColumns < end) {
      stage_columns<C, C::kColumns>(s.k[1 - buffer], s.v[1 - buffer], in, head,
                                    column + C::kColumns);
      cp_async_commit();
    }
    if (splits_columns) {
      const int step = warp_index() * kSplitStep;  // of 32 columns two warps get none
      if (step < C::kColumns && column + step < warp_end) {
        attend<C, kSplitStep>(in, s.scoring, s.dropout_rows, state, s_q,
                              s.k[buffer] + step * C::kStride, s.v[buffer] + step * C::kStride, row,
                              column + step, seen_end);
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < C::kColumns && column + step < warp_end; step += kStep) {
        attend<C, kStep>(in, s.scoring, s.dropout_rows, state, s_q, s.k[buffer] + step * C::kStride,
                         s.v[buffer] + step * C::kStride, row, column + step, seen_end);
      }
    }
    buffer = 1 - buffer;
  }
  // Results go where queries and columns were: every copy has landed (of a block whose rows see
  // nothing the first ones may still be under way), and every warp has read its operands.
  cp_async_wait<0>();
  sync_threads();
  if (splits_columns) {
    merge_warps<C>(p, s, head, state, row);
  } else if (row < in.S) {
    finish_rows<C>(p, head, state, s_q, row);
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
