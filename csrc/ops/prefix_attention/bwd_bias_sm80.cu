// prefix_attention, backward, the gradient of an additive bias, where it is wanted:
//   dbias = dS of the own columns, summed over the samples and heads that share it
//
// A block takes 64 queries x 64 own columns of one bias and walks the samples and heads that share
// it, in their order; dS is computed a second time, which costs two products and saves a tensor of
// [B, H, S, N]. The sum stays in registers. With T5's bias, [1, H, S, N], the walk is the batch.
//
// Shared memory per block, E = 32, 64, 96, 128: 20, 37, 53, 70 KB.
#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 1;
constexpr int kRows = 16 * kTilesM * kWarps;
constexpr int kColumns = 64;
constexpr int kStep = 32;  // columns that a warp works on at a time
constexpr int kSteps = kColumns / kStep;
constexpr int kTilesN = kStep / 8;

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
};

template <class C>
struct Shared {
  alignas(16) typename C::T q[kRows * C::kStride];  // [kRows, E]
  alignas(16) typename C::T dout[kRows * C::kStride];
  alignas(16) typename C::T k[kColumns * C::kStride];  // [kColumns, E]
  alignas(16) typename C::T v[kColumns * C::kStride];
  int scratch[kWarps];
};

using Sums = FragmentD[kSteps][kTilesN];

// Adds one sample's and head's dS of a warp's 16 queries from `row` on, at `column` and after it.
template <class C>
__device__ __forceinline__ void add_step(const BackwardParams& p, const Head& head, Shared<C>& s,
                                         FragmentD (&sums)[kTilesN], int at, int row, int column,
                                         int end) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int warp_at = warp_index() * 16 * C::kStride;
  FragmentD dots[kTilesM][kTilesN], dp[kTilesM][kTilesN];
  auto rows_of = [](const T* tile) {
    return [tile](int, int step) { return load_a(tile + 16 * step, C::kStride); };
  };
  multiply_rows<C>(dots, rows_of(s.q + warp_at), s.k + at * C::kStride);
  multiply_rows<C>(dp, rows_of(s.dout + warp_at), s.v + at * C::kStride);
  const Scoring scoring = scoring_of<T>(in, head);
  const DropoutRows rows = DropoutRows::of(in, head);
  uint32_t kept = ~uint32_t{0};
  if (in.dropout.is_active()) kept = kept_by_rows<kTilesN>(in, rows, row, column);
  const uint32_t seen = seen_columns<2 * kTilesN>(in, scoring.key_mask, end, [&](int i) {
    return column + 8 * (i / 2) + FragmentD::column(i % 2);
  });
  const float factor =
      score_by_rows<T>(in, scoring, scoring.own_factor, dots, row, column, end, seen);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t padded = head_index(in, head) * p.padded_rows + row + tile_row(0, i / 2);
    const float lse = p.row_lse[padded], delta = p.row_delta[padded];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const bool is_kept = (kept >> kept_bit_by_rows(n, i) & 1u) != 0;
      const float dweight = is_kept ? dp[0][n].r[i] * in.dropout.keep_scale : 0.0f;
      sums[n].r[i] += exp2_approx(dots[0][n].r[i] * factor - lse) * (dweight - delta);
    }
  }
}

template <class C>
__device__ __forceinline__ void store_sums(const BackwardParams& p, const Sums& sums, int64_t first,
                                           int row, int column) {
  using T = typename C::T;
  const Inputs& in = p.in;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own_row = row + tile_row(0, i / 2);
        const int own = column + step * kStep + 8 * n + FragmentD::column(i) - in.P;
        if (own_row >= in.S || own < 0 || own >= in.N) continue;
        const int64_t at = first + static_cast<int64_t>(own_row) * in.N + own;
        if (p.dbias.is_float32) {
          static_cast<float*>(p.dbias.data)[at] = sums[step][n].r[i];
        } else {
          static_cast<T*>(p.dbias.data)[at] = round_to<T>(sums[step][n].r[i]);
        }
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_bwd_bias_sm80(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared<C>>();
  const Inputs& in = p.in;
  const int row_tiles = (in.S + kRows - 1) / kRows, heads = p.is_dbias_shared_by_heads ? 1 : in.H;
  const int first_row = block_index_x() % row_tiles * kRows;
  // From a multiple of 4 of the joined axis on, where dropout's words start.
  const int column = in.P / 4 * 4 + block_index_y() * kColumns;
  const int member = block_index_x() / row_tiles;  // of the biases
  const int first_b = p.is_dbias_shared_by_batch ? 0 : member / heads;
  const int end_b = p.is_dbias_shared_by_batch ? in.B : first_b + 1;
  const int first_h = p.is_dbias_shared_by_heads ? 0 : member % heads;
  const int end_h = p.is_dbias_shared_by_heads ? in.H : first_h + 1;
  const int row = first_row + warp_index() * 16;
  const int last_row = first_row + kRows < in.S ? first_row + kRows - 1 : in.S - 1;

  Sums sums;
#pragma unroll 1
  for (int b = first_b; b < end_b; ++b) {
    sync_threads();  // the scratch is used again
    const int end = columns_seen(in, b, s.scratch);
    if (column >= row_limit(in, last_row, end)) continue;
#pragma unroll 1
    for (int h = first_h; h < end_h; ++h) {
      const Head head = {b, h, h / (in.H / in.G)};
      sync_threads();
      stage_rows<C, kRows>(s.q, head_rows<T>(in.q, in.q_strides, b, h), in.q_strides.row, first_row,
                           in.S);
      stage_rows<C, kRows>(s.dout,
                           static_cast<const T*>(p.dout) + head_index(in, head) * in.S * C::kE,
                           C::kE, first_row, in.S);
      stage_columns<C, kColumns>(s.k, s.v, in, head, column);
      cp_async_commit();
      cp_async_wait<0>();
      sync_threads();
      if (row >= in.S) continue;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_step<C>(p, head, s, sums[step], step * kStep, row, column + step * kStep, end);
      }
    }
  }
  const int64_t first = static_cast<int64_t>(member) * in.S * in.N;
  store_sums<C>(p, sums, first, row, column);
}

using Configs = ConfigsOf<Config>;

template <class C>
void launch_config(const BackwardParams& p, Stream stream) {
  const Inputs& in = p.in;
  const int members =
      (p.is_dbias_shared_by_batch ? 1 : in.B) * (p.is_dbias_shared_by_heads ? 1 : in.H);
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<C>);
  shape.blocks_x = members * ((in.S + kRows - 1) / kRows);
  shape.blocks_y = (in.P % 4 + in.N + kColumns - 1) / kColumns;
  launch<prefix_attention_bwd_bias_sm80<C>>("prefix_attention_bwd_bias_sm80", shape, stream, p);
}

}  // namespace

void launch_prefix_attention_bwd_bias_sm80(const BackwardParams& p, Stream stream) {
  if (p.in.N == 0) return;
  run_fitting<Configs>("prefix_attention_bwd_bias_sm80", p.in,
                       [&](auto tag) { launch_config<typename decltype(tag)::type>(p, stream); });
}

}  // namespace pelt::prefix_attention
