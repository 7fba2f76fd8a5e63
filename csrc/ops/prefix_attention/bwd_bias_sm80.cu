// prefix_attention, backward, the gradient of an additive bias, where it is wanted:
//   dbias = dS of the own columns, summed over the samples and heads that share it
//
// A block takes 64 queries x 64 own columns of one bias and walks the samples and heads that share
// it, in their order; dS is computed a second time, which costs two products and saves a tensor of
// [B, H, S, N]. The sum stays in registers. With T5's bias, [1, H, S, N], the walk is the batch.
//
//        one tile of dbias [64, 64]  =  sample 0, head h  |  sample 1, head h  |  ...
//                                       Q, dout x K, V       Q, dout x K, V
//
// Shared memory per block, E = 32, 64, 96, 128: 20, 37, 53, 70 KB.
#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 1;  // a warp takes 16 queries and all columns of the tile
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
  static constexpr int kVectors = kE / 8;  // of 16 bytes in a row
};

template <class C>
struct Shared {
  // Of one sample and head at a time.
  alignas(16) typename C::T q[kRows * C::kStride];  // [kRows, E]
  alignas(16) typename C::T dout[kRows * C::kStride];
  alignas(16) typename C::T k[kColumns * C::kStride];  // [kColumns, E]
  alignas(16) typename C::T v[kColumns * C::kStride];
  Start starts[kColumns / 2];  // of the tile's columns
  Seen<kColumns> seen;
  int scratch[kWarps];
};

using Sums = FragmentD[kSteps][kTilesN];  // a warp's [16, 64] of dbias

// Adds one sample's and head's dS of a warp's 16 queries from `row` on to the sums of kStep columns
// from `column` on, which begin at row `step` of the tile.
template <class C>
__device__ __forceinline__ void add_step(const BackwardParams& p, const Head& head, Shared<C>& s,
                                         FragmentD (&sums)[kTilesN], int step, int row,
                                         int column) {
  using T = typename C::T;
  const CudaInputs& in = p.in;
  const int warp_rows = warp_index() * 16 * C::kStride;
  FragmentD dots[kTilesM][kTilesN], dp[kTilesM][kTilesN];
  const auto rows_of = [](const T* tile) {
    return operands_at<C>(lane_address_of_a(tile, C::kStride));
  };
  const auto start_of_columns = [&](int n) {
    return start_of(s.starts[step / 2 + 4 * n + lane_index() % 4]);
  };
  multiply_rows<C>(dots, start_of_columns, rows_of(s.q + warp_rows),
                   lane_address_of_b_pair(s.k + step * C::kStride, C::kStride));
  multiply_rows<C>(dp, from_zero, rows_of(s.dout + warp_rows),
                   lane_address_of_b_pair(s.v + step * C::kStride, C::kStride));
  // Sample and head change from step to step here, so each thread derives what they do to scores.
  const Scoring scoring = scoring_of<T>(in, head);
  const DropoutRows rows = DropoutRows::of(in, head);
  // A bit for each element: one call of Philox gives four, so they are drawn before the loops.
  uint32_t kept = ~uint32_t{0};
  if (in.dropout.is_active()) kept = kept_by_rows<kTilesN>(in, rows, row, column);
  const float factor =
      score_by_rows<T>(in, scoring, in.scale * kLog2e, dots, start_of_columns, row, column);
  // dS = P (dP - D), as in the first launch, which left lse and D of every row. A tile may begin
  // with prefix columns; their sums are wrong without the gate, and are not stored.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t padded = head_index(in, head) * p.padded_rows + row + tile_row(0, i / 2);
    const float lse = p.row_lse[padded], delta = p.row_delta[padded];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const bool is_kept = (kept >> kept_bit_by_rows(n, i) & 1u) != 0;
      // Without dropout all bits are set and keep_scale is 1.
      const float dweight = is_kept ? dp[0][n].r[i] * in.dropout.keep_scale : 0.0f;
      sums[n].r[i] += exp2_approx(dots[0][n].r[i] * factor - lse) * (dweight - delta);
    }
  }
}

// Rounds the sums once, to the gradient's dtype. `first` is the offset of the bias's [S, N].
template <class C>
__device__ __forceinline__ void store_sums(const BackwardParams& p, const Sums& sums, int64_t first,
                                           int row, int column) {
  using T = typename C::T;
  const CudaInputs& in = p.in;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = row + tile_row(0, i / 2);
        const int key = column + step * kStep + 8 * n + FragmentD::column(i) - in.P;
        if (query >= in.S || key < 0 || key >= in.N) continue;
        const int64_t element = first + static_cast<int64_t>(query) * in.N + key;
        if (in.is_float32[kBias]) {
          in.grad_as<float>(kBias)[element] = sums[step][n].r[i];
        } else {
          in.grad_as<T>(kBias)[element] = round_to<T>(sums[step][n].r[i]);
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
  const CudaInputs& in = p.in;
  const int row_tiles = (in.S + kRows - 1) / kRows, heads = in.is_bias_shared_by_heads() ? 1 : in.H;
  const int first_row = block_index_x() % row_tiles * kRows;
  const int column = in.tiles_from(in.P) + block_index_y() * kColumns;
  // Which of the [S, N] matrices of the bias, and the samples and heads that share it.
  const int member = block_index_x() / row_tiles;
  const int first_b = in.is_bias_shared_by_batch() ? 0 : member / heads;
  const int end_b = in.is_bias_shared_by_batch() ? in.B : first_b + 1;
  const int first_h = in.is_bias_shared_by_heads() ? 0 : member % heads;
  const int end_h = in.is_bias_shared_by_heads() ? in.H : first_h + 1;
  const int row = first_row + warp_index() * 16;  // the warp's first query
  const int last_row = first_row + kRows < in.S ? first_row + kRows - 1 : in.S - 1;

  Sums sums;  // zero at first, and zero at the end where no query sees a column
#pragma unroll 1
  for (int b = first_b; b < end_b; ++b) {
    sync_threads();  // every thread has read the last sample's ends, and the scratch is used again
    if (thread_index() < kColumns) {
      write_seen(s.seen, is_column_seen(in, ReadColumns(in, b), column + thread_index()));
    }
    const int end = seen_end_of(in, b, s.scratch);  // with a barrier, behind which both are there
    // No query of the tile sees a column of it: dS is 0, for all heads of the sample.
    if (column >= row_limit(in, last_row, end)) continue;
#pragma unroll 1
    for (int h = first_h; h < end_h; ++h) {
      const Head head = {b, h, h / (in.H / in.G)};
      sync_threads();  // every warp is done with the last head's tiles, which are overwritten now
      stage_rows<C, kRows>(s.q, head_rows<T>(in, kQ, b, h), row_stride(in, kQ), first_row, in.S);
      stage_rows<C, kRows>(s.dout, in.doutput_as<T>(kOut) + head_index(in, head) * in.S * C::kE,
                           C::kE, first_row, in.S);
      stage_columns<C, kColumns>(s.k, s.v, in, head, column, s.seen);
      write_starts<kColumns>(s.starts, s.seen);
      cp_async_commit();
      // One buffer, so the copies are waited for at once: the kernel runs only for a trained bias,
      // and the other blocks of the multiprocessor work meanwhile.
      cp_async_wait<0>();
      sync_threads();             // every thread's copies have landed before any warp reads them
      if (row >= in.S) continue;  // the warp has no queries, and still meets the barriers above
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_step<C>(p, head, s, sums[step], step * kStep, row, column + step * kStep);
      }
    }
  }
  // The block is the only one with this tile, so it writes the whole sum and no kernel follows.
  const int64_t first = static_cast<int64_t>(member) * in.S * in.N;
  store_sums<C>(p, sums, first, row, column);
}

}  // namespace

void launch_bwd_bias_sm80(const BackwardParams& p) {
  const CudaInputs& in = p.in;
  if (in.N == 0) return;
  const int members =
      (in.is_bias_shared_by_batch() ? 1 : in.B) * (in.is_bias_shared_by_heads() ? 1 : in.H);
  const int row_tiles = (in.S + kRows - 1) / kRows;
  const int column_tiles = (in.P - in.tiles_from(in.P) + in.N + kColumns - 1) / kColumns;
  run_fitting<Config>("prefix_attention_bwd_bias_sm80", in, [&](auto tag, const char* name) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{members * row_tiles, column_tiles, 1, kThreads, sizeof(Shared<C>)};
    launch<prefix_attention_bwd_bias_sm80<C>>(name, shape, in.stream, p);
  });
}

}  // namespace pelt::prefix_attention
