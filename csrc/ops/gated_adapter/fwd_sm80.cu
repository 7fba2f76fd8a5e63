// gated_adapter, forward, one launch:
//   h = W_down pre_norm(x) + b_down,  y = residual + scale g dropout(post_norm(W_up phi(h) + b_up))
//
// A block of 4 warps takes kBlockT = 64 rows, a warp 16 of them:
//
//        x [64, D]  in chunks of 64 columns         W_up in chunks of 64 rows
//        |##|  |  |  |  |  |  --> h [64, R] -->  |  |  |##|  |  |  |  y [64, D]
//        W_down in chunks of 64 columns
//
// A ring of three buffers holds the chunks that cp.async brings. Ranks above the rank block (128)
// take several turns over x, which comes from L2 then. h is rounded to the activation's type before
// phi sees it, so that backward, which reads it from memory, uses the same numbers.
//
// The learned gate is one more row of W_down: its logit costs one mma for each 16 columns. A gate
// pooled over the sentence needs all of its tiles before it can scale anything: each tile leaves
// its partial sum and counts itself in the sentence's counter, then waits for the others and adds
// the partial sums in their order. The launch is cooperative and blocks take whole sentences
// together (a wave), first all down projections, then all up projections, so no block waits for a
// tile that is not being worked on. x is read once from memory, and once more from L2 when it is
// also the residual.
//
// Shared memory per block, R <= 16, 48, 64, 128, 512: 44, 60, 68, 103, 151 KiB.
//
// Why so: T rows are 2 D bytes in and out for 4 D R operations, which is memory-bound below R =
// 180. The schedule keeps x moving (two chunks in flight for each of several blocks on a
// multiprocessor) and touches it once; nothing of size [T, D] exists between x and y.
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

// hidden = W_down pre_norm(x) + b_down; and the gate's logits, where its weight is an extra row.
template <class C>
__device__ __forceinline__ void project_down(const Call& in, Shared<C>& s, const TileRows& rows,
                                             bool has_gate_row) {
  using T = typename C::T;
  const int64_t member = down_member_of(in, rows);
  const FragmentD logits = project_to_ranks<kDown, C>(
      in, s, in.parameter(kWDown), member, ExtraRow{in.parameter(kGateWeight), 0, has_gate_row},
      [&](T* tile, int first) { stage_x<typename C::Options>(tile, in, rows, s.rows, first); },
      [&](int rank, const FragmentD(&sums)[C::kRankTiles]) {
        put_hidden<C>(in, s, member, rank, sums);
      });
  if (has_gate_row && FragmentD::column(0) == 0) {  // the lanes that hold column 0
    const float bias = load_parameter<T>(in.parameter(kGateBias), 0);
    // r[0] and r[2] are the two rows of the lane; r[1] and r[3] belong to a row of zeros.
    s.rows.logit[warp_index() * 16 + FragmentD::row(0)] = logits.r[0] + bias;
    s.rows.logit[warp_index() * 16 + FragmentD::row(2)] = logits.r[2] + bias;
  }
  sync_threads();  // the logits are there; hidden is since the product's own barrier
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
    const Float8 weight = load_parameter_8<T>(in.parameter(kPostNormWeight), column);
    const Float8 bias = load_parameter_8<T>(in.parameter(kPostNormBias), column);
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
  project_to_columns<kUp, C>(p.in, s, p.in.parameter(kWUp), member,
                             [&](int first, const auto& sums) {
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

// The tile's share of its sentence's gate, by the first warp; the others go on.
template <class C>
__device__ __forceinline__ void publish_gate(const ForwardParams& p, const Shared<C>& s,
                                             const TileRows& rows, int tile) {
  if (warp_index() != 0) return;
  float sum = 0.0f, count = 0.0f;  // of the gates, of the rows that count
  for (int r = lane_index(); r < rows.count; r += 32) {
    const bool is_counted = counts(p.in, rows.first + r);
    // Padding adds 0, not 0 times what may be NaN.
    sum += is_counted ? sigmoid(s.rows.logit[r]) : 0.0f;
    count += is_counted ? 1.0f : 0.0f;
  }
  leave_sums(p.gate_partial, p.arrivals, rows, tile, sum, count);
}

template <class C>
__device__ __forceinline__ void await_gate(const ForwardParams& p, Shared<C>& s,
                                           const TileRows& rows) {
  await_sums(p.tiling, p.gate_partial, p.arrivals, rows, s.pooled);
  // One block of the sentence's writes what all of them have found.
  if (rows.index_in_group == 0 && thread_index() == 0) {
    p.in.output_as<float>(kGateValue)[rows.group] = s.pooled[0] / s.pooled[1];
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

// Where a tile's h is before its up projection.
enum class Hidden {
  kIsThere,       // in shared memory: this tile was projected down just now
  kIsInMemory,    // another tile of the block has taken its place: a wave of several tiles a block
  kIsNotComputed  // with skip_below, where the gates had to come first
};

template <class C>
__device__ __forceinline__ void finish_tile(const ForwardParams& p, Shared<C>& s,
                                            const TileRows& rows, Hidden hidden) {
  settle_factors<C>(p, s, rows);
  if (s.has_live_rows == 0) {
    copy_residual<C>(p, rows);
  } else {
    // h comes back rounded as it left, so that both ways give the same bits.
    if (hidden == Hidden::kIsInMemory) load_hidden<C>(p.in, s, rows, p.in.output[kH]);
    if (hidden == Hidden::kIsNotComputed) {
      // Again: with a pooled gate another tile's statistics may have taken their place.
      if (C::Options::has_pre_norm(p.in))
        measure_rows<typename C::Options, typename C::T>(p.in, rows, s.rows, false);
      sync_threads();  // the statistics are there
      project_down<C>(p.in, s, rows, /*has_gate_row=*/false);
      store_hidden<C>(p.in, s, rows, p.in.output[kH]);
    }
    activate_hidden<C>(p.in, s);
    // A post-norm's statistics cost the up projection once more.
    if (C::Options::has_post_norm(p.in)) measure_output<C>(p.in, s, rows);
    store_y<C>(p, s, rows);
  }
  sync_threads();  // the next tile may replace the factors and hidden
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    gated_adapter_fwd_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Tiling& tiling = p.tiling;
  const bool is_learned = C::Options::has_learned_gate(p.in);
  const bool is_pooled = C::Options::has_pooled_gate(p.in);
  // A gate that decides whether to project at all must be known before; and beside a pre-norm the
  // tile in shared memory is not x.
  const bool projects_late = C::Options::has_skip(p.in);
  const bool has_gate_row = is_learned && !projects_late && !C::Options::has_pre_norm(p.in);
  const bool wants_logit = is_learned && !has_gate_row;
  clear_extra_rows<C>(s);
  sync_threads();  // no copy of an extra row may come before the zeros

  for (int wave = 0; wave < tiling.tiles; wave += p.wave_tiles) {
    const int end = wave + p.wave_tiles < tiling.tiles ? wave + p.wave_tiles : tiling.tiles;
    // Down projections, and without a pooled gate the rest of each tile too.
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile<kBlockT>(tiling, tile);
      if (C::Options::has_pre_norm(p.in) || wants_logit) {
        measure_rows<typename C::Options, typename C::T>(p.in, rows, s.rows, wants_logit);
        sync_threads();  // statistics and logits are there
      }
      if (!projects_late) {
        // For backward, and for the second loop where the block has several tiles.
        project_down<C>(p.in, s, rows, has_gate_row);
        store_hidden<C>(p.in, s, rows, p.in.output[kH]);
      }
      if (is_pooled) {
        publish_gate<C>(p, s, rows, tile);
      } else {
        finish_tile<C>(p, s, rows, projects_late ? Hidden::kIsNotComputed : Hidden::kIsThere);
      }
      sync_threads();  // the next tile may replace the logits that publish_gate reads
    }
    if (!is_pooled) continue;
    // The up projections of the wave, each when its sentence's gate is known.
    const bool has_several = end - wave > grid_blocks_x();  // tiles for some block
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile<kBlockT>(tiling, tile);
      await_gate<C>(p, s, rows);
      // With one tile a block, what the first loop left in shared memory is still this tile's.
      finish_tile<C>(p, s, rows,
                     projects_late ? Hidden::kIsNotComputed
                                   : (has_several ? Hidden::kIsInMemory : Hidden::kIsThere));
    }
  }
}

using Configs = ConfigsOf<Config>;

}  // namespace

void launch_fwd_sm80(const ForwardParams& p) {
  const bool found = run_first_fit_here<Shared>(
      Configs{}, [&](auto tag) { return serves<typename decltype(tag)::type>(p.in); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        launch_over_tiles<gated_adapter_fwd_sm80<C>>("gated_adapter_fwd_sm80", p,
                                                     sizeof(Shared<C>));
      });
  check(found, "gated_adapter_fwd_sm80: expected a call that why_not serves, got ",
        name_of(p.in.dtype), " and R=", p.in.R);
}

}  // namespace pelt::gated_adapter
