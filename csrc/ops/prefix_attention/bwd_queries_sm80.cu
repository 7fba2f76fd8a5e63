// prefix_attention, backward, first launch: dq, and what the other launches need of each row.
//   P = 2^(score - lse),  D = rowsum(dout . out),  dS = P (dropout g dout V^T - D)
//   dq = scale g dS K,  dgate = sum over prefix columns of dS scale Q K^T + dropout P dout V^T
//
// A block of 4 warps takes 128 queries of one head, a warp 32 of them, as in forward, and walks the
// joined axis of prefix and own columns:
//
//        Q, dout [128, E]   | prefix 0 | prefix 1 | K, V ...            |
//        |########| x 2     |    tile    |    tile    |    tile    | -- |  --> dq [128, E]
//
// Before that it writes lse, in units of log 2, and D to the workspace. Where p has to be 0 (a row
// that sees nothing, a row beyond S) lse becomes +inf: then 2^(score - lse) is 0, and never
// -inf - (-inf). The gate's gradient is summed over the block in this launch, because here a block
// meets every prefix column of its rows; the last launch adds the blocks' sums in their order.
//
// In the composed form out and lse are those of the whole row, the only columns are those of
// prefixes, and flash attention's dq of the own columns is added to dq before it is stored.
//
// Products in bf16 or f16 with float32 sums; P, D and dS in float32 until dS enters its product.
// Shared memory per block, E = 32, 64, 96, 128: 41, 74, 81, 105 KB.
#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 2;  // [16, 16] tiles of queries that a warp holds
constexpr int kWarpRows = 16 * kTilesM;
constexpr int kRows = kWarps * kWarpRows;
static_assert(kRows == kQueryTile, "the plan counts these tiles");

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  // Smaller steps for wide heads: two score tiles and dq [32, E] are accumulators at once.
  static constexpr int kColumns = kE <= 64 ? 64 : 32;
  // Columns that a warp works on at a time where scores have one factor and probabilities none; in
  // general they are 16, for which the registers suffice.
  static constexpr int kPlainStep = kE <= 64 ? 32 : 16;
  static constexpr bool kKeepsQ = kE <= 64;  // in registers, where there is room
  static constexpr int kMinBlocks = 2;
};

constexpr int kGeneralStep = 16;

template <class C>
struct Shared {
  alignas(16) typename C::T q[kRows * C::kStride];  // [kRows, E]; at the end dq
  alignas(16) typename C::T dout[kRows * C::kStride];
  // Two buffers of [kColumns, E].
  alignas(16) typename C::T k[2][C::kColumns * C::kStride];
  alignas(16) typename C::T v[2][C::kColumns * C::kStride];
  alignas(16) float lse[kRows];      // in units of log 2; +inf where p is 0
  float delta[kRows];                // D
  Start starts[2][C::kColumns / 2];  // of the buffers' columns
  // Of the tiles with the buffers' numbers; each is made a tile before that is staged.
  Seen<C::kColumns> seen[2];
  // The same for all threads, and here instead of in registers, of which the accumulators leave
  // few.
  Scoring scoring;
  DropoutRows dropout_rows;
  ReadColumns read;
  Head head;
  float dgate[kWarps];
  int scratch[kWarps];
};

// What a warp carries along the columns. Index [m][half] is the lane's row tile_row(m, half).
template <class C>
struct State {
  FragmentD dq[kTilesM][C::kE / 8];
  FragmentA q[kTilesM][C::kKeepsQ ? C::kE / 16 : 1];  // unused without kKeepsQ
  float minus_lse[kTilesM][2];                        // in units of log 2; -inf where p is 0
  float delta[kTilesM][2];
  float dgate = 0.0f;  // over this lane's rows and columns only
};

// Brings what a warp needs of its rows into registers, for the whole walk along the columns.
template <class C>
__device__ __forceinline__ void load_rows(State<C>& state, const Shared<C>& s, uint32_t q_of_lane) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_index() * kWarpRows + tile_row(m, half);
      state.minus_lse[m][half] = -s.lse[row];
      state.delta[m][half] = s.delta[row];
    }
  }
  if constexpr (C::kKeepsQ) load_operands<C>(state.q, q_of_lane);
}

// Writes lse and D of the block's rows to shared memory, for this launch, and to the workspace, for
// the next ones. Four lanes take a row, because its 16-byte vectors lie side by side.
template <class C>
__device__ __forceinline__ void measure_rows(const BackwardParams& p, Shared<C>& s,
                                             const Head& head, int first_row) {
  using T = typename C::T;
  const int64_t first = head_index(p.in, head) * p.in.S + first_row;
  const int64_t padded = head_index(p.in, head) * p.padded_rows + first_row;
  const T *g_out = p.in.output_as<T>(kOut), *g_dout = p.in.doutput_as<T>(kOut);
#pragma unroll 1
  for (int r = thread_index() / 4; r < kRows; r += kThreads / 4) {
    const bool is_there = first_row + r < p.in.S;
    float dot = 0.0f;
    if (is_there) {
#pragma unroll
      for (int e = thread_index() % 4 * 8; e < C::kE; e += 32) {  // four lanes, 8 elements each
        const Float8 out = load_8(g_out + (first + r) * C::kE + e);
        const Float8 dout = load_8(g_dout + (first + r) * C::kE + e);
#pragma unroll
        for (int i = 0; i < 8; ++i) dot += out.v[i] * dout.v[i];
      }
    }
    dot = group_sum<4>(dot);
    if (thread_index() % 4 != 0) continue;  // all four have the sum; one writes it
    const float lse = is_there ? p.in.output_as<float>(kLse)[first + r] : kMinusInfinity;
    s.lse[r] = lse == kMinusInfinity ? -kMinusInfinity : lse * kLog2e;
    s.delta[r] = dot;
    // Rows beyond S are written too: the next launch copies whole tiles of kRowTile rows.
    if (first_row + r < p.padded_rows) {
      p.row_lse[padded + r] = s.lse[r];
      p.row_delta[padded + r] = dot;
    }
  }
}

// Turns scores and dP into dS, in place of the scores, where neither gate nor dropout is in them.
template <class C, int kTilesN>
__device__ __forceinline__ void differentiate(const State<C>& state, float factor,
                                              FragmentD (&scores)[kTilesM][kTilesN],
                                              const FragmentD (&dp)[kTilesM][kTilesN]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = scores[m][n].r[i];
        const float probability = exp2_approx(fmaf(value, factor, state.minus_lse[m][i / 2]));
        value = probability * (dp[m][n].r[i] - state.delta[m][i / 2]);
      }
    }
  }
}

// The same with gate and dropout: g dS. `factor` is what score_by_rows has left to be applied; with
// a prefix in the step it is 1, and the scores are without the gate.
template <class C, int kTilesN>
__device__ __forceinline__ void differentiate_gated(const CudaInputs& in, const Shared<C>& s,
                                                    State<C>& state, float factor,
                                                    FragmentD (&scores)[kTilesM][kTilesN],
                                                    const FragmentD (&dp)[kTilesM][kTilesN],
                                                    int row, int column) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    // A bit for each element: one call of Philox gives four, so they are drawn before the loops.
    uint32_t kept = ~uint32_t{0};
    if (in.dropout.is_active()) {
      kept = kept_by_rows<kTilesN>(in, s.dropout_rows, row + 16 * m, column);
    }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_kept = (kept >> kept_bit_by_rows(n, i) & 1u) != 0;
        // Without dropout all bits are set and keep_scale is 1.
        const float dweight = is_kept ? dp[m][n].r[i] * in.dropout.keep_scale : 0.0f;
        const bool is_prefix = column + 8 * n + FragmentD::column(i) < in.P;
        const float gate = is_prefix ? s.scoring.gate : 1.0f;
        float& value = scores[m][n].r[i];
        const float probability =
            exp2_approx(fmaf(value, factor * gate, state.minus_lse[m][i / 2]));
        const float dscore = probability * (dweight * gate - state.delta[m][i / 2]);
        // The gate multiplies the key, hence the score, and the value, hence the probability. The
        // score is in units of log 2, and the gradient is not.
        if (is_prefix) state.dgate += dscore * (value * kLn2) + probability * dweight;
        value = dscore * gate;
      }
    }
  }
}

// What a lane reads: the addresses that it passes to ldmatrix, of the warp's rows and of a buffer,
// and the start of its first pair of columns.
struct Operands {
  uint32_t q;
  uint32_t dout;
  uint32_t k;
  uint32_t k_transposed;
  uint32_t v;
  const Start* start;
};

// One step of a warp: kColumnsOfStep columns from `column` on, which begin at row `step` of the
// buffer. The two products give scores and dP, differentiate turns them into dS, and the third adds
// dS K to dq.
template <class C, int kColumnsOfStep, bool kIsPlain>
__device__ __forceinline__ void attend(const CudaInputs& in, State<C>& state, const Shared<C>& s,
                                       const Operands& from, int step, int row, int column) {
  constexpr int kTilesN = kColumnsOfStep / 8;
  FragmentD ds[kTilesM][kTilesN], dp[kTilesM][kTilesN];  // ds: scores at first
  const uint32_t offset = step * C::kStride * 2;
  const Start* start = from.start + step / 2;
  const auto start_of_columns = [&](int n) { return start_of(start[4 * n]); };
  multiply_rows<C>(ds, start_of_columns, operands_of<C, C::kKeepsQ>(state.q, from.q),
                   from.k + offset);
  multiply_rows<C>(dp, from_zero, operands_at<C>(from.dout), from.v + offset);
  if constexpr (kIsPlain) {
    differentiate<C>(state, in.scale * kLog2e, ds, dp);
  } else {
    // Prefix columns get the factor of own ones: their scores without the gate give its gradient.
    const float factor = score_by_rows<typename C::T>(in, s.scoring, in.scale * kLog2e, ds,
                                                      start_of_columns, row, column);
    differentiate_gated<C>(in, s, state, factor, ds, dp, row, column);
  }
  accumulate_rows<C>(state.dq, ds, from.k_transposed + offset);
}

// All steps of a warp in a buffer of columns from `column` on, of which it sees `columns`.
template <class C>
__device__ __forceinline__ void attend_to_tile(const CudaInputs& in, State<C>& state,
                                               const Shared<C>& s, const Operands& from, int row,
                                               int column, int columns) {
  int step = 0;
#pragma unroll 1
  while (step < columns) {
    if (columns - step > C::kPlainStep - 16 && is_plain(in, row, column + step, C::kPlainStep)) {
      attend<C, C::kPlainStep, true>(in, state, s, from, step, row, column + step);
      step += C::kPlainStep;
    } else {
      attend<C, kGeneralStep, false>(in, state, s, from, step, row, column + step);
      step += kGeneralStep;
    }
  }
}

// Multiplies dq by the scale, and adds the dq of own columns that another attention has found.
template <class C>
__device__ __forceinline__ void finish_dq(const BackwardParams& p, const Head& head,
                                          State<C>& state, int row) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + tile_row(m, half);
      const bool is_zero = query < p.in.S && sees_nothing(p.in, head.b, query);
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        float (&dq)[4] = state.dq[m][n].r;
        dq[2 * half] = is_zero ? 0.0f : dq[2 * half] * p.in.scale;
        dq[2 * half + 1] = is_zero ? 0.0f : dq[2 * half + 1] * p.in.scale;
      }
    }
  }
  if (p.own_dq == nullptr) return;
  const auto* own_dq = head_rows<typename C::T>(p.in, kK, head.b, head.h);
  const int64_t stride = row_stride(p.in, kK);
  add_rows<C>(state.dq, own_dq + row * stride, stride, p.in.S - row);
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    prefix_attention_bwd_queries_sm80(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared<C>>();
  const CudaInputs& in = p.in;
  const Head head = head_of(in, block_index_x() / p.row_tiles);
  // Under a causal mask the last rows see the most columns: their blocks start first.
  const int tile = p.row_tiles - 1 - block_index_x() % p.row_tiles;
  const int first_row = tile * kRows, row = first_row + warp_index() * kWarpRows;

  // lse and D may be all that is needed.
  const bool has_more = in.grad[kQ] != nullptr || p.gate_partial != nullptr;
  if (has_more) {  // their copies are under way while the rows are measured
    stage_rows<C, kRows>(s.q, head_rows<T>(in, kQ, head.b, head.h), row_stride(in, kQ), first_row,
                         in.S);
    const T* g_dout = in.doutput_as<T>(kOut) + head_index(in, head) * in.S * C::kE;
    stage_rows<C, kRows>(s.dout, g_dout, C::kE, first_row, in.S);
  }
  measure_rows<C>(p, s, head, first_row);
  if (!has_more) return;
  // Written while the copies are under way, and there behind the barrier of seen_end_of, with the
  // rows' lse and D: what is the same for all threads, and what is seen of the first two tiles.
  const ReadColumns read(in, head.b);
  see_tiles<C::kColumns>(in, read, s.seen);
  if (thread_index() == 0) {
    s.scoring = scoring_of<T>(in, head);
    s.dropout_rows = DropoutRows::of(in, head);
    s.read = read;
    s.head = head;
  }
  // Ends of the columns that the sample sees, that any row of the block sees, and that any row of
  // the warp sees: the block stages tiles up to the second, a warp multiplies up to the third.
  int seen_end = seen_end_of(in, head.b, s.scratch);
  // Without dq only the prefix columns matter: they hold the gate's gradient.
  if (in.grad[kQ] == nullptr) seen_end = in.P;
  const int end =
      row_limit(in, first_row + kRows < in.S ? first_row + kRows - 1 : in.S - 1, seen_end);
  const int last_row = row + kWarpRows < in.S ? row + kWarpRows - 1 : in.S - 1;
  const int warp_end = row < in.S ? row_limit(in, last_row, seen_end) : 0;

  stage_columns<C, C::kColumns>(s.k[0], s.v[0], in, head, 0, s.seen[0]);
  write_starts<C::kColumns>(s.starts[0], s.seen[0]);
  cp_async_commit();

  State<C> state;
  const int warp_rows = warp_index() * kWarpRows * C::kStride;
  const uint32_t q_of_lane = lane_address_of_a(s.q + warp_rows, C::kStride);
  int buffer = 0;  // the one that holds the columns from `column` on
#pragma unroll 1
  for (int column = 0; column < end; column += C::kColumns) {
    cp_async_wait<0>();
    // The tile is there, every thread's copies included, and every warp is done with the last one,
    // whose buffer is filled next.
    sync_threads();
    if (column == 0) load_rows<C>(state, s, q_of_lane);
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
        q_of_lane,
        lane_address_of_a(s.dout + warp_rows, C::kStride),
        lane_address_of_b_pair(s.k[buffer], C::kStride),
        lane_address_of_b_pair_transposed(s.k[buffer], C::kStride),
        lane_address_of_b_pair(s.v[buffer], C::kStride),
        s.starts[buffer] + lane_index() % 4,
    };
    const int columns = warp_end - column < C::kColumns ? warp_end - column : C::kColumns;
    attend_to_tile<C>(in, state, s, operands, row, column, columns);
    if (sees_tile) write_seen(s.seen[buffer], is_seen);
    buffer = 1 - buffer;
  }
  // dq goes where the queries were: of a block whose rows see nothing their copies may still be
  // under way, and a copy may have been another thread's.
  cp_async_wait<0>();
  sync_threads();
  if (in.grad[kQ] != nullptr && row < in.S) {
    // Only this warp reads or writes these rows of s.q from here on.
    T* s_q = s.q + warp_index() * kWarpRows * C::kStride;
    finish_dq<C>(p, head, state, row);
    put_rows<C>(s_q, state.dq, 1.0f);
    T* g_dq = in.grad_as<T>(kQ) + (head_index(in, head) * in.S + row) * C::kE;
    store_rows<C>(g_dq, s_q, 0, row + kWarpRows < in.S ? kWarpRows : in.S - row);
  }
  if (p.gate_partial == nullptr) return;  // the same for the whole block
  const float sum = warp_sum(state.dgate);
  if (lane_index() == 0) s.dgate[warp_index()] = sum;
  sync_threads();  // every warp's sum is written before thread 0 adds them
  if (thread_index() != 0) return;
  float total = 0.0f;  // in the order of the warps, so that two runs give the same bits
  for (int w = 0; w < kWarps; ++w) total += s.dgate[w];
  p.gate_partial[head_index(in, head) * p.row_tiles + tile] = total;
}

}  // namespace

void launch_bwd_queries_sm80(const BackwardParams& p) {
  const int blocks = p.in.B * p.in.H * p.row_tiles;
  run_fitting<Config>("prefix_attention_bwd_queries_sm80", p.in, [&](auto tag, const char* name) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{blocks, 1, 1, kThreads, sizeof(Shared<C>)};
    launch<prefix_attention_bwd_queries_sm80<C>>(name, shape, p.in.stream, p);
  });
}

}  // namespace pelt::prefix_attention
