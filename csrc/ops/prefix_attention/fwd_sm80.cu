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
// cp.async brings one while the other is worked on, with one barrier for each tile. A warp works on
// kStep columns at a time and stops at the last one it sees, so that padding, the causal triangle
// and a short tail cost no products. Up to 32 queries, as in decoding, are taken by all four warps,
// which share the columns of a tile and add up what they have seen at the end.
//
// The gate is a factor of a score (instead of the prefix's key) and of a probability (instead of
// its value). Scores are in units of log 2. Softmax is online, in float32: a row keeps its maximum
// m and its own part of the sum of 2^(score - m), which four lanes add up at the end. While a row
// has seen nothing m is -inf, and 0 stands for it, since -inf - (-inf) would be NaN. The
// accumulators are rescaled only when a maximum of the warp has grown, which is rare after the
// first steps.
//
// In the composed form flash attention has seen K and V, and a row starts where that has ended: its
// output is the accumulator, its log-sum-exp the maximum, and the sum is 1.
//
// Tiles are padded by 16 bytes for each row, an odd number of 16-byte units: ldmatrix meets no bank
// twice, and all its addresses are one register and a constant, which a swizzle would not give.
// Shared memory per block, E = 32, 64, 96, 128: 30, 55, 80, 70 KB.
#include <cstddef>

#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 2;  // [16, 16] tiles of queries that a warp holds
constexpr int kWarpRows = 16 * kTilesM;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kStep = 32;        // columns that a warp works on at a time
constexpr int kSharedStep = 16;  // the same where warps share their queries

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  static constexpr int kColumns = kE <= 96 ? 64 : 32;
  // Q stays in registers where there is room: a third less traffic from shared memory.
  static constexpr bool kKeepsQ = kE <= 64;
  static constexpr int kMinBlocks = kE <= 32 ? 3 : 2;
  static_assert(kE % 32 == 0, "a row is a whole number of k steps and of vectors for four lanes");
};

template <class C>
struct Shared {
  alignas(16) typename C::T q[kRows * C::kStride];  // [kRows, E]; at the end out
  alignas(16) typename C::T k[2][C::kColumns * C::kStride];
  alignas(16) typename C::T v[2][C::kColumns * C::kStride];
  // Here and not in registers, of which the accumulators leave few.
  Scoring scoring;
  DropoutRows dropout_rows;
  int scratch[kWarps];
};

// What a warp carries along the columns.
template <class C>
struct State {
  FragmentD out[kTilesM][C::kE / 8];
  FragmentA q[kTilesM][C::kKeepsQ ? C::kE / 16 : 1];
  float maximum[kTilesM][2];
  float sum[kTilesM][2];
};

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

// This block's operand of Q K^T: from registers, or each time from shared memory.
template <class C>
__device__ __forceinline__ FragmentA query_operand(const State<C>& state, const typename C::T* s_q,
                                                   int m, int step) {
  if constexpr (C::kKeepsQ) return state.q[m][step];
  return load_a(s_q + 16 * m * C::kStride + 16 * step, C::kStride);
}

// Where rows start: nothing seen yet, or all own columns by another attention. Four lanes share a
// row's sum, so one of them has all of it.
template <class C>
__device__ __forceinline__ void start_rows(const ForwardParams& p, const Head& head,
                                           State<C>& state, int row, bool takes_own) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.maximum[m][half] = kMinusInfinity;
      state.sum[m][half] = 0.0f;
      const int own_row = row + tile_row(m, half);
      if (!takes_own || own_row >= p.in.S) continue;
      const float lse = p.own_lse[head_index(p.in, head) * p.in.S + own_row];
      state.maximum[m][half] = lse * kLog2e;
      state.sum[m][half] = lane_index() % 4 == 0 && lse != kMinusInfinity ? 1.0f : 0.0f;
    }
  }
  if (!takes_own) return;
  const Strides& strides = p.own_out_strides;
  const auto* own = head_rows<typename C::T>(p.own_out, strides, head.b, head.h);
  add_rows<C>(state.out, own + row * strides.row, strides.row, p.in.S - row);
}

// Scores, times a positive factor, become probabilities, up to 2^-maximum, which the accumulators
// follow.
template <class C, int kTilesN>
__device__ __forceinline__ void exponentiate(State<C>& state, float factor,
                                             FragmentD (&scores)[kTilesM][kTilesN]) {
  float maximum[kTilesM][2];
  bool has_grown = false;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = kMinusInfinity;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        most = fmaxf(most, fmaxf(scores[m][n].r[2 * half], scores[m][n].r[2 * half + 1]));
      }
      most = fmaxf(most, shfl_xor(most, 1));
      most = fmaxf(most, shfl_xor(most, 2)) * factor;
      most = fmaxf(most, state.maximum[m][half]);
      maximum[m][half] = most;
      has_grown |= most > state.maximum[m][half];
    }
  }
  if (vote_any(has_grown)) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
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
    for (int i = 0; i < 4; ++i) {
      const float most = state.maximum[m][i / 2];
      const float base = most == kMinusInfinity ? 0.0f : most;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        scores[m][n].r[i] = exp2_approx(scores[m][n].r[i] * factor - base);
        state.sum[m][i / 2] += scores[m][n].r[i];
      }
    }
  }
}

// What multiplies values: a gate for those of prefixes, and dropout's zeros. Its factor for what is
// kept comes at the end.
template <int kTilesN>
__device__ __forceinline__ void weigh_columns(const Inputs& in, const Scoring& scoring,
                                              const DropoutRows& rows,
                                              FragmentD (&p)[kTilesM][kTilesN], int row,
                                              int column) {
  if (in.gate.data != nullptr && column < in.P) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
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

// One step of a warp: the columns from `column` on, which are at s_k and s_v.
template <class C, int kColumnsOfStep>
__device__ __forceinline__ void attend(const Inputs& in, const Scoring& scoring,
                                       const DropoutRows& rows, State<C>& state,
                                       const typename C::T* s_q, const typename C::T* s_k,
                                       const typename C::T* s_v, int row, int column, int end) {
  constexpr int kTilesN = kColumnsOfStep / 8;
  const uint32_t seen = seen_columns<2 * kTilesN>(in, scoring.key_mask, end, [&](int i) {
    return column + 8 * (i / 2) + FragmentD::column(i % 2);
  });
  FragmentD p[kTilesM][kTilesN];
  multiply_rows<C>(p, [&](int m, int step) { return query_operand<C>(state, s_q, m, step); }, s_k);
  const float factor =
      score_by_rows<typename C::T>(in, scoring, scoring.prefix_factor, p, row, column, end, seen);
  exponentiate(state, factor, p);
  weigh_columns(in, scoring, rows, p, row, column);
  accumulate_rows<C>(state.out, p, s_v);
}

// From the maximum and the sum, both in units of log 2. An infinite score stays one, though its
// probabilities are NaN; a sum of 0 means that nothing was seen (a NaN is not 0).
__device__ __forceinline__ float log_sum_exp(float most, float sum) {
  return sum == 0.0f || most == -kMinusInfinity ? most : (most + log2f(sum)) * kLn2;
}

// out = accumulators / sum, and lse. A row that has seen nothing is 0 and its lse -inf.
template <class C>
__device__ __forceinline__ void finish_rows(const ForwardParams& p, const Head& head,
                                            State<C>& state, typename C::T* s_out, int row) {
  const Inputs& in = p.in;
  const int64_t first = head_index(in, head) * in.S + row;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = group_sum<4>(state.sum[m][half]);
      const float factor = sum == 0.0f ? 0.0f : in.dropout.keep_scale / sum;
      const int own = tile_row(m, half);
      if (lane_index() % 4 == 0 && row + own < in.S) {
        p.lse[first + own] = log_sum_exp(state.maximum[m][half], sum);
      }
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        state.out[m][n].r[2 * half] *= factor;
        state.out[m][n].r[2 * half + 1] *= factor;
      }
    }
  }
  put_rows<C>(s_out, state.out, 1.0f);
  store_rows<C>(static_cast<typename C::T*>(p.out) + first * C::kE, s_out, 0,
                row + kWarpRows < in.S ? kWarpRows : in.S - row);
}

// The same where the four warps have seen different columns of the same queries: their accumulators
// meet in shared memory and are added in their order.
template <class C>
__device__ __forceinline__ void merge_warps(const ForwardParams& p, Shared<C>& s, const Head& head,
                                            State<C>& state, int row) {
  constexpr int kSize = kWarpRows * C::kE;
  static_assert(sizeof(float) * kWarps * (kSize + 2 * kWarpRows) <= offsetof(Shared<C>, scoring),
                "what warps have seen fits where queries and columns were");
  using T = typename C::T;
  const Inputs& in = p.in;
  float* s_out = reinterpret_cast<float*>(s.q);   // [kWarps, kWarpRows, E]
  float* s_maximum = s_out + kWarps * kSize;      // [kWarps, kWarpRows]
  float* s_sum = s_maximum + kWarps * kWarpRows;  // [kWarps, kWarpRows]
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = warp_index() * kWarpRows + tile_row(m, half);
      const float sum = group_sum<4>(state.sum[m][half]);
      if (lane_index() % 4 == 0) {
        s_maximum[own] = state.maximum[m][half];
        s_sum[own] = sum;
      }
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        const int at = own * C::kE + 8 * n + FragmentD::column(0);
        s_out[at] = state.out[m][n].r[2 * half];
        s_out[at + 1] = state.out[m][n].r[2 * half + 1];
      }
    }
  }
  sync_threads();
  const int64_t first = head_index(in, head) * in.S + row;
  for (int i = thread_index(); i < (in.S - row) * C::kVectors; i += kThreads) {
    const int own = i / C::kVectors, e = i % C::kVectors * 8;
    float most = kMinusInfinity, sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, s_maximum[w * kWarpRows + own]);
    const float base = most == kMinusInfinity ? 0.0f : most;
    Float8 out = {};
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = exp2_approx(s_maximum[w * kWarpRows + own] - base);
      sum += s_sum[w * kWarpRows + own] * shrink;
      for (int j = 0; j < 8; ++j) {
        out.v[j] += s_out[(w * kWarpRows + own) * C::kE + e + j] * shrink;
      }
    }
    const float factor = sum == 0.0f ? 0.0f : in.dropout.keep_scale / sum;
    for (int j = 0; j < 8; ++j) out.v[j] *= factor;
    store_16(static_cast<T*>(p.out) + (first + own) * C::kE + e, narrow<T>(out));
    if (e == 0) p.lse[first + own] = log_sum_exp(most, sum);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    prefix_attention_fwd_sm80(const __grid_constant__ ForwardParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared<C>>();
  const Inputs& in = p.in;
  const int row_tiles = (in.S + kRows - 1) / kRows;
  const Head head = head_of(in, block_index_x() / row_tiles);
  // Under a causal mask the last rows see most: those blocks start first.
  const int first_row = (row_tiles - 1 - block_index_x() % row_tiles) * kRows;
  // Few queries (decoding, the end of a sequence): all warps take them, and each its own columns.
  const bool shares = in.S - first_row <= kWarpRows;
  const int warp_at = shares ? 0 : warp_index() * kWarpRows, row = first_row + warp_at;

  stage_rows<C, kRows>(s.q, head_rows<T>(in.q, in.q_strides, head.b, head.h), in.q_strides.row,
                       first_row, in.S);
  stage_columns<C, C::kColumns>(s.k[0], s.v[0], in, head, 0);
  cp_async_commit();
  if (thread_index() == 0) {
    s.scoring = scoring_of<T>(in, head);
    s.dropout_rows = DropoutRows::of(in, head);
  }
  const int seen = columns_seen(in, head.b, s.scratch);
  const int end =
      row_limit(in, first_row + kRows - 1 < in.S ? first_row + kRows - 1 : in.S - 1, seen);
  const int last_row = row + kWarpRows < in.S ? row + kWarpRows - 1 : in.S - 1;
  const int warp_end = row < in.S ? row_limit(in, last_row, seen) : 0;

  State<C> state;
  // Of warps that share their queries only the first one goes on from there.
  start_rows<C>(p, head, state, row, p.own_out != nullptr && !(shares && warp_index() > 0));
  T* s_q = s.q + warp_at * C::kStride;
  int buffer = 0;
#pragma unroll 1
  for (int column = 0; column < end; column += C::kColumns) {
    cp_async_wait<0>();
    sync_threads();
    if constexpr (C::kKeepsQ) {
      if (column == 0) load_operands<C>(state, s_q);
    }
    if (column + C::kColumns < end) {
      stage_columns<C, C::kColumns>(s.k[1 - buffer], s.v[1 - buffer], in, head,
                                    column + C::kColumns);
      cp_async_commit();
    }
    if (shares) {
      const int at = warp_index() * kSharedStep;
      if (at < C::kColumns && column + at < warp_end) {
        attend<C, kSharedStep>(in, s.scoring, s.dropout_rows, state, s_q,
                               s.k[buffer] + at * C::kStride, s.v[buffer] + at * C::kStride, row,
                               column + at, seen);
      }
    } else {
#pragma unroll 1
      for (int at = 0; at < C::kColumns && column + at < warp_end; at += kStep) {
        attend<C, kStep>(in, s.scoring, s.dropout_rows, state, s_q, s.k[buffer] + at * C::kStride,
                         s.v[buffer] + at * C::kStride, row, column + at, seen);
      }
    }
    buffer = 1 - buffer;
  }
  cp_async_wait<0>();
  sync_threads();
  if (shares) {
    merge_warps<C>(p, s, head, state, row);
  } else if (row < in.S) {
    finish_rows<C>(p, head, state, s_q, row);
  }
}

using Configs = ConfigsOf<Config>;

template <class C>
void launch_config(const ForwardParams& p, Stream stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<C>);
  shape.blocks_x = p.in.B * p.in.H * ((p.in.S + kRows - 1) / kRows);
  launch<prefix_attention_fwd_sm80<C>>("prefix_attention_fwd_sm80", shape, stream, p);
}

}  // namespace

void launch_prefix_attention_fwd_sm80(const ForwardParams& p, Stream stream) {
  run_fitting<Configs>("prefix_attention_fwd_sm80", p.in,
                       [&](auto tag) { launch_config<typename decltype(tag)::type>(p, stream); });
}

}  // namespace pelt::prefix_attention
