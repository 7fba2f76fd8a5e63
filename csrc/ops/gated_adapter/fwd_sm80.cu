// gated_adapter, forward, one launch:
//   h = W_down x + b_down,  y = residual + scale g dropout(W_up phi(h) + b_up)
//
// for the calls that methods make (options.h); fwd_general_sm80.cu serves the others. A block takes a
// tile of 64, 32 or 16 rows:
//
//        x [rows, D]  in chunks of 64 columns         W_up in chunks of 64 rows
//        |##|  |  |  |  |  |  --> h [rows, R] -->  |  |  |  |  |  |##|  y [rows, D]
//        W_down in chunks of 64 columns
//
// The chunks of both products pass through one ring (stream.cuh), the residual's among them: the
// second product finds it in shared memory, and leaves y in its place, from where it goes out in
// 16-byte pieces. h is rounded to the activation's type before phi sees it, so that backward, which
// reads it from memory, uses the same numbers.
//
// The learned gate is one more row of W_down: its logit costs one mma for each 16 columns. A gate
// pooled over the sentence needs all of its tiles before it can scale anything: each tile leaves
// its partial sum and counts itself in the sentence's counter, then waits for the others and adds
// the partial sums in their order. The launch is cooperative and blocks take whole sentences
// together (a wave), first all down projections, then all up projections, so no block waits for a
// tile that is not being worked on.
//
// Why so: T rows are 2 D bytes in and out for 4 D R operations, which is memory-bound below R =
// 180. A tall tile reads the weights less often from the second-level cache: 2 R / 64 times the
// bytes of x. Where there are fewer such tiles than multiprocessors, lower ones keep more of these
// busy. x is read once from memory, and once more from the second-level cache when it is also the
// residual; nothing of size [T, D] exists between x and y.
#include "common/check.h"
#include "ops/gated_adapter/stream.cuh"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {
namespace {

// The vectors [D] and [R] that every tile of a bank's member takes, in float32, and the gate's weight
// as the product takes it. The caller has a barrier behind it.
template <class C>
__device__ __forceinline__ void load_columns(const Call& in, StreamShared<C>& s,
                                             int64_t down_member, int64_t up_member) {
  using T = typename C::T;
  for (int d = 8 * thread_index(); d < in.D; d += 8 * C::kThreads) {
    Float8 bias = {};
    if (in.input[kBUp] != nullptr) {
      bias = load_parameter_8<T>(in.parameter(kBUp), up_member * in.D + d);
    }
    for (int e = 0; e < 8; ++e) s.columns[d + e] = bias.v[e];
    if (has_learned_gate(in)) {
      const Float8 weight = load_parameter_8<T>(in.parameter(kGateWeight), d);
      store_16(reinterpret_cast<T*>(s.columns + in.D) + d, narrow<T>(weight));
    }
  }
  for (int r = thread_index(); r < C::kRanks; r += C::kThreads) {
    const bool has_bias = in.input[kBDown] != nullptr && r < in.R;
    s.b_down[r] = has_bias ? load_rounded<T>(in.parameter(kBDown), down_member * in.R + r) : 0.0f;
  }
  if (thread_index() < kChunk / 2) store_4(s.zeros + 2 * thread_index(), 0);
}

// h + b_down of the warps' registers to shared memory, rounded; the logits too.
template <class C>
__device__ __forceinline__ void put_hidden(const Call& in, StreamShared<C>& s,
                                           const RankSums<C>& sums) {
  using T = typename C::T;
  if (half_of_columns<C>() == 0) {
#pragma unroll
    for (int n = 0; n < C::kRankTiles; ++n) {
      const int rank = first_rank<C>() + 8 * n + FragmentD::column(0);
      const float bias[2] = {s.b_down[rank], s.b_down[rank + 1]};
#pragma unroll
      for (int half = 0; half < 2 * C::kRowTiles; ++half) {  // two neighbours of each of two rows
        const int row = first_row<C>() + half / 2 * 16 + FragmentD::row(half % 2 * 2);
        const float* sum = sums.of[half / 2][n].r + half % 2 * 2;
        store_4(&s.hidden[row * C::kRankStride + rank],
                pack<T>(sum[0] + bias[0], sum[1] + bias[1]));
      }
    }
    if (has_learned_gate(in) && first_rank<C>() == 0 && FragmentD::column(0) == 0) {
      const float bias = load_parameter<T>(in.parameter(kGateBias), 0);
      for (int half = 0; half < 2 * C::kRowTiles; ++half) {
        const int row = first_row<C>() + half / 2 * 16 + FragmentD::row(half % 2 * 2);
        // r[0] and r[2] are the two rows of the lane; r[1] and r[3] belong to a row of zeros.
        const float own = sums.logits[half / 2].r[half % 2 * 2];
        s.logit[row] = own + (C::kHalves == 2 ? s.half_logit[row] : 0.0f) + bias;
      }
    }
  }
  sync_threads();  // h and the logits are there
}

// phi(h) in the place of h, which goes to memory after the first product, or comes from there where
// another tile of the block has taken its place since.
template <class C>
__device__ __forceinline__ void activate_hidden(const Call& in, StreamShared<C>& s,
                                                const TileRows& rows, bool has_down) {
  using T = typename C::T;
  constexpr int kRankVectors = C::kRanks / 8;
  T* g_hidden = in.output_as<T>(kH) + rows.first * in.R;
#pragma unroll 1
  for (uint32_t i = thread_index(); i < C::kTileRows * kRankVectors; i += C::kThreads) {
    const int row = i / kRankVectors, rank = i % kRankVectors * 8;
    T* at = s.hidden + row * C::kRankStride + rank;
    T* g_at = g_hidden + row * in.R + rank;
    const bool is_there = row < rows.count && rank < in.R;
    Words4 words = {};
    if (has_down) {
      words = load_16(at);
      if (is_there) store_16(g_at, words);
    } else if (is_there) {
      words = load_16(g_at);
    }
    with_activation(in.activation, [&](auto phi) {
      constexpr Activation kPhi = decltype(phi)::value;
      if constexpr (kPhi == Activation::kRelu) {
        Float8 h = widen<T>(words);
        for (int e = 0; e < 8; ++e) h.v[e] = activate(kPhi, h.v[e]);
        store_16(at, narrow<T>(h));
      } else {
        if (!has_down) store_16(at, words);
#pragma unroll 1  // once for each tile, and long: what counts is the size of the code
        for (int e = 0; e < 8; e += 2) {
          const Float2 h = unpack<T>(load_4(at + e));
          store_4(at + e, pack<T>(activate(kPhi, h.low), activate(kPhi, h.high)));
        }
      }
    });
  }
  sync_threads();  // the product that follows reads what other threads wrote
}

// scale g of this lane's rows: [m][h] is that of row 16 m + FragmentD::row(2 h) of the warp.
template <class C>
struct Factors {
  float of[C::kRowTiles][2];
};

template <class C>
__device__ __forceinline__ Factors<C> factors_of(const ForwardParams& p, const StreamShared<C>& s,
                                                 const TileRows& rows) {
  using T = typename C::T;
  const Call& in = p.in;
  const float scale = scale_of<T>(in);
  const bool is_pooled = has_pooled_gate(in), is_learned = has_learned_gate(in);
  const bool is_given = !is_learned && in.input[kGate] != nullptr;
  const float of_all = is_pooled ? s.pooled[0] / s.pooled[1] : 1.0f;  // of the sentence
  Factors<C> factors;
#pragma unroll
  for (int i = 0; i < 2 * C::kRowTiles; ++i) factors.of[i / 2][i % 2] = scale * of_all;
  if (is_pooled || !(is_learned || is_given)) return factors;
#pragma unroll 1  // the code of one row is enough
  for (int half = 0; half < 2 * C::kRowTiles; ++half) {
    const int row = first_row<C>() + half / 2 * 16 + FragmentD::row(half % 2 * 2);
    float gate = 0.0f;
    if (row < rows.count && is_given) {
      gate = gate_of_row<T, Plain>(in, nullptr, rows.first + row);
    } else if (row < rows.count) {
      gate = sigmoid(s.logit[row]);  // each row's own, kept for backward
      if (first_column<C>() == 0 && FragmentD::column(0) == 0) {
        in.output_as<float>(kGateValue)[rows.first + row] = gate;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i) {  // registers have no index
      if (i == half) factors.of[i / 2][i % 2] = scale * gate;
    }
  }
  return factors;
}

// Which of a warp's outputs are kept: bit 4 (kColumnTiles m + n) + i is that of element i of its tile
// [m][n]. Four neighbouring columns are one Philox block, and two neighbouring lanes have two of them
// each, of two rows: each lane draws for one of the rows.
template <class C>
__device__ __forceinline__ uint32_t draw_kept(const Call& in, const TileRows& rows, int first) {
  const bool is_odd = lane_index() % 2 == 1;
  const int row = first_row<C>() + FragmentD::row(is_odd ? 2 : 0);
  const int column = first + first_column<C>() + lane_index() % 4 / 2 * 4;
  uint32_t kept = 0;
#pragma unroll 1  // a tile at a time: the code of one Philox is enough
  for (int i = 0; i < C::kRowTiles * C::kColumnTiles; ++i) {
    const int64_t row_of_i = rows.first + row + i / C::kColumnTiles * 16;
    const uint64_t block =
        static_cast<uint64_t>(row_of_i * in.D + column + i % C::kColumnTiles * 8) / 4;
    const PhiloxWords words = philox4x32_10(
        {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}},
        static_cast<uint32_t>(in.dropout.seed), static_cast<uint32_t>(in.dropout.seed >> 32));
    uint32_t own = 0;
    for (int e = 0; e < 4; ++e) own |= (words.word[e] >= in.dropout.threshold ? 1u : 0u) << e;
    const uint32_t others = shfl_xor(own, 1);
    const uint32_t upper = is_odd ? others : own, lower = is_odd ? own : others;  // rows
    const int shift = is_odd ? 2 : 0;                                             // columns
    kept |= ((upper >> shift & 3) | (lower >> shift & 3) << 2) << 4 * i;
  }
  return kept;
}

// y = residual + scale g dropout(u), with phi(h) in s.hidden.
template <class C>
__device__ __forceinline__ void project_up(const ForwardParams& p, Stream<C>& stream,
                                           StreamShared<C>& s, const TileRows& rows) {
  using T = typename C::T;
  const Call& in = p.in;
  constexpr int kRowBytes = C::kRowStride * sizeof(T);
  const int lane = lane_index();
  const Factors<C> factors = factors_of<C>(p, s, rows);
  // Where the lane's fragments are in the slot, its rows of an ldmatrix, and its 16-byte pieces, of
  // which eight neighbouring lanes have a column: the banks of eight rows differ.
  const uint32_t ring = shared_address(s.slots), zeros = shared_address(s.zeros);
  const uint32_t of_pair = ring + (first_row<C>() + FragmentD::row(0)) * kRowBytes +
                           (first_column<C>() + FragmentD::column(0)) * sizeof(T);
  const uint32_t of_rows = ring + (first_row<C>() + lane % 16) * kRowBytes +
                           (first_column<C>() + lane / 16 * 8) * sizeof(T);
  const int row = first_row<C>() + lane % 8 + lane / 16 * 8;
  const int column = first_column<C>() + lane / 8 % 2 * 8;
  const uint32_t of_vector = ring + row * kRowBytes + column * sizeof(T);
  // Of the chunk at hand: both go back with the chunks.
  T* g_y = in.output_as<T>(kY) + (rows.first + row) * in.D + column + in.D - kChunk;
  uint32_t bias =
      shared_address(s.columns + in.D - kChunk + first_column<C>() + FragmentD::column(0));

  stream_to_columns<C>(
      stream, s, in.D,
      [&](ColumnSums<C>& u) {
        for_constants<C::kColumnTiles>([&](auto n) {
          constexpr int kTile = decltype(n)::value;
          const Float2 pair = load_shared_pair_at<kTile * 32>(bias);
          for (int m = 0; m < C::kRowTiles; ++m) {
            u[m][kTile] = {{pair.low, pair.high, pair.low, pair.high}};
          }
        });
        bias -= kChunk * sizeof(float);
      },
      [&](int first, uint32_t slot, ColumnSums<C>& u) {
        FragmentA residual[C::kRowTiles];
        for_constants<C::kRowTiles>([&](auto m) {
          constexpr int kTile = decltype(m)::value, kBytes = kTile * 16 * kRowBytes;
          const uint32_t at = stream.has_residual ? slot + of_rows + kBytes : zeros;
          ldmatrix_x4_at<0>(residual[kTile].r, at);
        });
        sync_warp();  // all lanes have what they read of the residual, whose place y takes
        if (in.dropout.is_active()) {
          const uint32_t kept = draw_kept<C>(in, rows, first);
#pragma unroll
          for (int i = 0; i < 4 * C::kRowTiles * C::kColumnTiles; ++i) {
            u[i / 8][i / 4 % 2].r[i % 4] *= kept >> i & 1 ? in.dropout.keep_scale : 0.0f;
          }
        }
        // u is float32 from the product's sums to the one rounding at the end.
        for_constants<4 * C::kRowTiles>([&](auto i) {  // pairs of neighbours of this lane
          constexpr int m = decltype(i)::value / 4, n = decltype(i)::value / 2 % 2;
          constexpr int h = decltype(i)::value % 2;
          const Float2 x = unpack<T>(residual[m].r[2 * n + h]);
          const float* own = u[m][n].r + 2 * h;
          store_shared_4_at<(16 * m + 8 * h) * kRowBytes + 16 * n>(
              slot + of_pair,
              pack<T>(x.low + factors.of[m][h] * own[0], x.high + factors.of[m][h] * own[1]));
        });
        sync_warp();  // a lane reads what others wrote
        for_constants<C::kRowTiles>([&](auto m) {
          constexpr int kRow = decltype(m)::value * 16;
          const Words4 y = load_shared_16_at<kRow * kRowBytes>(slot + of_vector);
          if (row + kRow < rows.count) {
            store_global_16_streaming(g_y + static_cast<int64_t>(kRow) * in.D, y);
          }
        });
        g_y -= kChunk;
      });
}

// is_first: of the block's tiles. has_down, has_up: which of the products this pass computes.
template <class C>
__device__ __forceinline__ void run_tile(const ForwardParams& p, StreamShared<C>& s, int tile,
                                         bool is_first, bool has_down, bool has_up) {
  using T = typename C::T;
  const Call& in = p.in;
  const TileRows rows = rows_of_tile<C::kTileRows>(p.tiling, tile);
  const int64_t down_member = down_member_of(in, rows), up_member = up_member_of(in, rows);
  Stream<C> stream(p, s, rows, down_member, up_member, has_down, has_up);
  if (is_first || has_weights_per_sample(in)) load_columns<C>(in, s, down_member, up_member);
  if (has_down) {
    RankSums<C> sums;
    const T* gate_weight =
        has_learned_gate(in) ? reinterpret_cast<const T*>(s.columns + in.D) : nullptr;
    stream_to_ranks<C>(stream, s, in.D / kChunk, gate_weight, sums);
    add_halves<C>(stream, s, sums);
    put_hidden<C>(in, s, sums);
  }
  activate_hidden<C>(in, s, rows, has_down);
  if (has_pooled_gate(in)) {
    if (has_down) publish_gate(p, s.logit, rows);
    if (has_up) await_gate(p, rows, s.pooled);
  }
  if (has_up) project_up<C>(p, stream, s, rows);
  sync_threads();  // the next tile may replace what is in shared memory
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    gated_adapter_fwd_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<StreamShared<C>>();
  bool is_first = true;
  for_each_pass(p, has_pooled_gate(p.in), [&](int tile, bool has_down, bool has_up) {
    run_tile<C>(p, s, tile, is_first, has_down, has_up);
    is_first = false;
  });
}

using Configs = StreamConfigs;

}  // namespace

void launch_fwd_sm80(const ForwardParams& p) {
  const bool found = run_first_fit(
      Configs{}, [&](auto tag) { return serves_forward<typename decltype(tag)::type>(p.in); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        launch_over_tiles<gated_adapter_fwd_sm80<C>>("gated_adapter_fwd_sm80", p, C::kThreads,
                                                     stream_bytes<C>(p.in));
      });
  if (!found) launch_fwd_general_sm80(p);
}

}  // namespace pelt::gated_adapter
