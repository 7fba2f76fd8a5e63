// gated_adapter, forward, one launch, for the calls that fwd_sm80.cu has no kernel for: with norms, with
// rows that are skipped, with ranks above 128 or no multiple of 8, with widths that are no multiple
// of 64. What a call asks for is decided at run time.
//   h = W_down pre_norm(x) + b_down,  y = residual + scale g dropout(post_norm(W_up phi(h) + b_up))
//
// A block of 4 warps takes kBlockT = 64 rows, a warp 16 of them:
//
//        x [64, D]  in chunks of 64 columns         W_up in chunks of 64 rows
//        |##|  |  |  |  |  |  --> h [64, R] -->  |  |  |##|  |  |  |  y [64, D]
//        W_down in chunks of 64 columns
//
// A ring of three buffers holds the chunks that cp.async brings. Ranks above the rank block (128)
// take several turns over x, which comes from L2 then. Gates, waves and the rounding of h are those of
// fwd_sm80.cu; a gate that decides whether to project at all, and one beside a pre-norm, is computed
// from x before the product. A post-norm costs the up projection once more.
//
// Shared memory per block, R <= 64, 512: 68, 151 KiB.
#include "common/check.h"
#include "ops/gated_adapter/products.cuh"

namespace pelt::gated_adapter {
namespace {

// h + b_down of one rank block, from the warps' registers to shared memory, rounded to the
// activation's type there.
template <class C>
__device__ __forceinline__ void put_hidden(const Call& in, Shared<C>& s, int64_t member, int rank,
                                           const FragmentD (&sums)[C::kRankTiles]) {
  using T = typename C::T;
  for (int n = 0; n < C::kRankTiles; ++n) {
    for (int half = 0; half < 2; ++half) {  // a lane has two neighbours of each of two rows
      const int row = warp_index() * 16 + FragmentD::row(2 * half);
      const int column = rank + 8 * n + FragmentD::column(0);
      float value[2];
      for (int e = 0; e < 2; ++e) {
        // Ranks beyond R are sums over the zeros that were staged for them.
        const bool has_bias = in.input[kBDown] != nullptr && column + e < in.R;
        const float bias =
            has_bias ? load_rounded<T>(in.parameter(kBDown), member * in.R + column + e) : 0.0f;
        value[e] = sums[n].r[2 * half + e] + bias;
      }
      // Both go as one 32-bit access: column is even.
      store_4(&s.hidden[row * C::kHiddenStride + column], pack<T>(value[0], value[1]));
    }
  }
}

// hidden = W_down pre_norm(x) + b_down; and the gate's logits, where its weight is an extra row: these
// are there behind the next barrier, which is store_hidden's.
template <class C>
__device__ __forceinline__ void project_down(const ForwardParams& p, Shared<C>& s,
                                             const TileRows& rows, bool has_gate_row) {
  using T = typename C::T;
  const Call& in = p.in;
  const int64_t member = down_member_of(in, rows);
  const FragmentD logits = project_to_ranks<kDown, C>(
      in, s, p.w_down, member, ExtraRow{in.parameter(kGateWeight), 0, has_gate_row},
      [&](T* tile, int first) {
        stage_x<typename C::Options>(tile, in, rows, s.rows, member, first);
      },
      [&](int rank, const FragmentD(&sums)[C::kRankTiles]) {
        put_hidden<C>(in, s, member, rank, sums);
      });
  if (has_gate_row && FragmentD::column(0) == 0) {  // the lanes that hold column 0
    const float bias = load_parameter<T>(in.parameter(kGateBias), 0);
    // r[0] and r[2] are the two rows of the lane; r[1] and r[3] belong to a row of zeros.
    s.rows.logit[warp_index() * 16 + FragmentD::row(0)] = logits.r[0] + bias;
    s.rows.logit[warp_index() * 16 + FragmentD::row(2)] = logits.r[2] + bias;
  }
}

// Eight neighbouring elements of residual + scale g dropout(post_norm(u)).
template <class C>
__device__ __forceinline__ void store_y_8(const ForwardParams& p, const Shared<C>& s,
                                          const TileRows& rows, int64_t member, int row, int column,
                                          Float8 u) {
  using T = typename C::T;
  const Call& in = p.in;
  const int64_t at = (rows.first + row) * in.D + column;
  // u is float32 from the product's sums to the one rounding at the end.
  if (in.input[kBUp] != nullptr) {
    const Float8 bias = load_parameter_8<T>(in.parameter(kBUp), member * in.D + column);
    for (int e = 0; e < 8; ++e) u.v[e] += bias.v[e];
  }
  if (C::Options::has_post_norm(in)) {
    const int64_t at_norm = post_norm_at(in, member) + column;
    const Float8 weight = load_parameter_8<T>(in.parameter(kPostNormWeight), at_norm);
    const Float8 bias = load_parameter_8<T>(in.parameter(kPostNormBias), at_norm);
    for (int e = 0; e < 8; ++e) {
      u.v[e] = (u.v[e] - s.out_mean[row]) * s.out_rstd[row] * weight.v[e] + bias.v[e];
    }
  }
  if (C::Options::has_dropout(in)) {
    // Drawn from the element's index: backward draws the same factors again.
    const Float8 factors = dropout_of_row(in, rows.first + row, column);
    for (int e = 0; e < 8; ++e) u.v[e] *= factors.v[e];
  }
  Float8 residual = {};
  if (in.residual_from != ResidualFrom::kNone) {
    const bool is_x = in.residual_from == ResidualFrom::kInput;
    const void* from = is_x ? in.input[kX] : in.input[kResidual];
    residual = load_8(static_cast<const T*>(from) + at);
  }
  // A row that is skipped is not made of u, whatever it holds.
  const float factor = s.rows.factor[row];
  const bool is_skipped = C::Options::has_skip(in) && factor == 0.0f;
  for (int e = 0; e < 8; ++e) u.v[e] = residual.v[e] + (is_skipped ? 0.0f : factor * u.v[e]);
  store_16(p.in.output_as<T>(kY) + at, narrow<T>(u));
}

template <class C>
__device__ __forceinline__ void store_y(const ForwardParams& p, Shared<C>& s,
                                        const TileRows& rows) {
  const int64_t member = up_member_of(p.in, rows);
  project_to_columns<kUp, C>(p.in, s, p.w_up, member, [&](int first, const auto& sums) {
    for_each_8(s.out[warp_index()], rows, first, p.in.D, sums,
               [&](int, int row, int column, const Float8& u) {
                 store_y_8<C>(p, s, rows, member, row, column, u);
               });
  });
}

// y = residual for a tile all of whose gates are below the threshold: no product is computed.
template <class C>
__device__ __forceinline__ void copy_residual(const ForwardParams& p, const TileRows& rows) {
  using T = typename C::T;
  const Call& in = p.in;
  const bool is_x = in.residual_from == ResidualFrom::kInput;
  const void* from = is_x ? in.input[kX] : in.input[kResidual];
  // The rows of a tile lie one behind the other, so they are one stretch of memory.
  for (int i = thread_index(); i < rows.count * (in.D / 8); i += kThreads) {
    const int64_t at = rows.first * in.D + static_cast<int64_t>(i) * 8;
    Words4 words = {};
    if (in.residual_from != ResidualFrom::kNone) {
      words = load_global_16(static_cast<const T*>(from) + at);
    }
    store_16(p.in.output_as<T>(kY) + at, words);
  }
}

// factor = scale g of each row, and whether the tile has a row that is not skipped.
template <class C>
__device__ __forceinline__ void settle_factors(const ForwardParams& p, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const Call& in = p.in;
  if (warp_index() == 0) {  // two rows for each lane
    const float scale = scale_of<T>(in);
    bool is_any_live = false;
    for (int r = lane_index(); r < kBlockT; r += 32) {
      float gate = 0.0f;
      if (r < rows.count && C::Options::has_pooled_gate(in)) {
        gate = s.pooled[0] / s.pooled[1];  // one for the sentence, which await_gate has found
      } else if (r < rows.count && C::Options::has_learned_gate(in)) {
        gate = sigmoid(s.rows.logit[r]);  // each row's own, kept for backward
        p.in.output_as<float>(kGateValue)[rows.first + r] = gate;
      } else if (r < rows.count) {
        gate =
            gate_of_row<T, typename C::Options>(in, nullptr, rows.first + r);  // a given one, or 1
      }
      const bool is_skipped = C::Options::has_skip(in) && gate < in.skip_below;
      is_any_live |= r < rows.count && !is_skipped;
      s.rows.factor[r] = is_skipped ? 0.0f : scale * gate;
    }
    is_any_live = vote_any(is_any_live);
    if (lane_index() == 0) s.has_live_rows = is_any_live ? 1 : 0;
  }
  sync_threads();  // the factors are there, and the whole block takes the same branch
}

// hidden = h of the tile: projected from x, or as it went to memory rounded, which gives the same
// bits.
template <class C>
__device__ __forceinline__ void make_hidden(const ForwardParams& p, Shared<C>& s,
                                            const TileRows& rows, bool is_in_memory,
                                            bool has_gate_row) {
  if (is_in_memory) {
    load_hidden<C>(p.in, s, rows, p.in.output[kH]);
    return;
  }
  project_down<C>(p, s, rows, has_gate_row);
  store_hidden<C>(p.in, s, rows, p.in.output[kH]);  // for backward, and for a second pass
}

// has_down, has_up: which of the products this pass over the tiles computes.
template <class C>
__device__ __forceinline__ void run_tile(const ForwardParams& p, Shared<C>& s, int tile,
                                         bool has_down, bool has_up) {
  using Options = typename C::Options;
  const TileRows rows = rows_of_tile<kBlockT>(p.tiling, tile);
  // A gate that decides whether to project at all must be known before; and beside a pre-norm the
  // tile in shared memory is not x.
  const bool is_learned = Options::has_learned_gate(p.in);
  const bool has_pre_norm = Options::has_pre_norm(p.in), projects_late = Options::has_skip(p.in);
  const bool has_gate_row = is_learned && !projects_late && !has_pre_norm;
  const bool wants_logit = is_learned && !has_gate_row && has_down;
  // Statistics again in a second pass: another tile's have taken their place.
  if (wants_logit || (has_pre_norm && (has_down || projects_late))) {
    measure_rows<Options, typename C::T>(p.in, rows, s.rows, wants_logit);
    sync_threads();  // statistics and logits are there
  }
#pragma unroll 1  // each of the two at one place: they are most of the kernel's code
  for (int turn = 0; turn < 2; ++turn) {
    if ((turn == 0) != projects_late) {
      make_hidden<C>(p, s, rows, !has_down && !projects_late, has_gate_row);
      continue;
    }
    if (Options::has_pooled_gate(p.in)) {
      if (has_down) publish_gate(p, s.rows.logit, rows);
      if (has_up) await_gate(p, rows, s.pooled);
    }
    if (!has_up) {
      if (projects_late) break;
      continue;
    }
    settle_factors<C>(p, s, rows);
    if (s.has_live_rows == 0) {
      copy_residual<C>(p, rows);
      has_up = false;
      break;
    }
  }
  if (has_up) {
    activate_hidden<C>(p.in, s);
    // A post-norm's statistics cost the up projection once more.
    if (Options::has_post_norm(p.in)) measure_output<C>(p.in, s, rows, p.w_up);
    store_y<C>(p, s, rows);
  }
  sync_threads();  // the next tile may replace the logits, the factors and hidden
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    gated_adapter_fwd_general_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  clear_extra_rows<C>(s);
  sync_threads();  // no copy of an extra row may come before the zeros
  for_each_pass(p, C::Options::has_pooled_gate(p.in), [&](int tile, bool has_down, bool has_up) {
    run_tile<C>(p, s, tile, has_down, has_up);
  });
}

using Configs = GeneralConfigsOf<Config>;

}  // namespace

void launch_fwd_general_sm80(const ForwardParams& p) {
  const bool found = run_first_fit_here<Shared>(
      Configs{}, [&](auto tag) { return serves<typename decltype(tag)::type>(p.in); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        launch_over_tiles<gated_adapter_fwd_general_sm80<C>>("gated_adapter_fwd_general_sm80", p,
                                                             kThreads, sizeof(Shared<C>));
      });
  check(found, "gated_adapter_fwd_general_sm80: expected a call that why_not serves, got ",
        name_of(p.in.dtype), " and R=", p.in.R);
}

}  // namespace pelt::gated_adapter
