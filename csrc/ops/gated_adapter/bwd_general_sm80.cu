// gated_adapter, backward, first of two launches, for the calls that bwd_sm80.cu has no kernel for;
// what a call asks for is decided at run time. With dy' = dropout(dy) and u = W_up phi(h) + b_up:
//
//   v   = dy' W_up                            [T, R]   one read of dy
//   dot = v . phi(h) + dy' . b_up             [T]      equals dy' . u, without computing u
//   dh  = scale g v phi'(h)                   [T, R]   to memory, for the second launch
//   dx  = dh W_down + dlogit w_gate + dy      [T, D]   through the pre-norm, if there is one
//
// dlogit comes from the dots: those of the row (token), or of the whole sentence (pooled); then
// tiles wait for their sentence as in forward. b_up is one more column of W_up, so its share of the
// dot costs one mma for each 16 columns.
//
//        dy' [64, D]  in chunks of 64 columns       W_down in chunks of 64 columns
//        |##|  |  |  |  |  |  --> dh [64, R] -->  |  |  |##|  |  |  |  dx [64, D]
//        W_up in chunks of 64 rows
//
// With a post-norm u is needed after all: it is computed three times from h (for the row's mean and
// deviation, for the two sums of the norm's gradient, for du), du goes to memory, and from there on
// it takes the place of scale g dy'. A pre-norm needs two sums of each row of dh W_down before the
// first element of dx, so that product is done twice. The norms' own gradients are sums over rows:
// each block leaves the sum over its tiles, or of each tile where samples have norms of their own,
// and the second launch adds them up in order.
//
// Tiles, ring and shared memory are the general forward's (products.cuh). Read: dy, h, and x for a learned gate
// or a pre-norm; written: dx, dh.
#include "common/check.h"
#include "ops/gated_adapter/backward_rows.cuh"
#include "ops/gated_adapter/products.cuh"

namespace pelt::gated_adapter {
namespace {

// The sums over a warp's 16 rows of two quantities, for this lane's eight columns.
struct ColumnSums {
  Float8 weight = {};  // of what a norm's weight gets
  Float8 bias = {};

  // Adds the four lanes that share the columns, kVectors apart, and leaves the warp's sums in its
  // part of shared memory, [2, kChunk].
  __device__ __forceinline__ void leave(float* out) {
    sync_warp();  // `out` is free: all lanes have read the products
    const int column = lane_index() % kVectors * 8;
    for (int e = 0; e < 8; ++e) {
      for (int mask = kVectors; mask < 32; mask *= 2) {
        weight.v[e] += shfl_xor(weight.v[e], mask);
        bias.v[e] += shfl_xor(bias.v[e], mask);
      }
      if (lane_index() < kVectors) {
        out[column + e] = weight.v[e];
        out[kChunk + column + e] = bias.v[e];
      }
    }
  }
};

// Adds the warps' sums of a chunk of columns to the block's own in memory, or to the tile's, which it
// has for each norm; `norm` counts those that are there. The order of the sum over a block's tiles is
// theirs.
template <class C>
__device__ __forceinline__ void leave_columns(const BackwardParams& p, Shared<C>& s, int tile,
                                              int norm, int first, ColumnSums& sums) {
  static_assert(2 * kChunk == kThreads, "a thread adds one element");
  sums.leave(s.out[warp_index()]);
  sync_threads();  // all four warps' sums are there; the next step's barrier frees `out` again
  const int i = thread_index(), vector = i / kChunk, column = first + i % kChunk;
  if (column >= p.in.D) return;
  const float sum = (s.out[0][i] + s.out[1][i]) + (s.out[2][i] + s.out[3][i]);
  const int leaves = leaves_norms_by_tile(p.in) ? tile : block_index_x();
  const int64_t slot = static_cast<int64_t>(leaves) * norms_of(p.in) + norm;
  float* to = p.norm_partial + (2 * slot + vector) * p.in.D + column;
  const bool is_first = tile == leaves;  // of the block's tiles
  *to = is_first ? sum : *to + sum;
}

// factor = scale g of each row; 0 of rows that are not there. Like what measure_rows writes it is read
// behind the barrier of load_hidden, which follows.
template <class C>
__device__ __forceinline__ void settle_factors(const BackwardParams& p, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const int r = thread_index();  // half of the block has a row each
  if (r < kBlockT) {
    const bool is_there = r < rows.count;
    s.rows.factor[r] =
        is_there ? factor_of_row<T, typename C::Options>(p.in, rows.first + r) : 0.0f;
  }
}

// Eight elements of dy after dropout.
template <class C, class T = typename C::T>
__device__ __forceinline__ Float8 load_dropped(const BackwardParams& p, int64_t row, int column) {
  Float8 values = load_8(p.in.doutput_as<T>(kY) + row * p.in.D + column);
  if (C::Options::has_dropout(p.in)) {
    const Float8 factors = dropout_of_row(p.in, row, column);
    for (int e = 0; e < 8; ++e) values.v[e] *= factors.v[e];
  }
  return values;
}

// Eight elements of the normed output (u + b_up - mean) / deviation, from those of W_up phi(h).
template <class C>
__device__ __forceinline__ Float8 normed_output(const BackwardParams& p, const Shared<C>& s,
                                                int64_t member, int row, int column, Float8 u) {
  Float8 bias = {};
  if (p.in.input[kBUp] != nullptr) {
    bias = load_parameter_8<typename C::T>(p.in.parameter(kBUp), member * p.in.D + column);
  }
  for (int e = 0; e < 8; ++e) {
    u.v[e] = (u.v[e] + bias.v[e] - s.out_mean[row]) * s.out_rstd[row];
  }
  return u;
}

// With a post-norm: dot of each row, and du = d loss / d u, to memory.
template <class C>
__device__ __forceinline__ void derive_output(const BackwardParams& p, Shared<C>& s,
                                              const TileRows& rows, int tile) {
  using T = typename C::T;
  const Call& in = p.in;
  const int64_t member = up_member_of(in, rows), norm_at = post_norm_at(in, member);
  // phi(h) takes the place of h; derive_hidden loads h again.
  load_hidden<C>(in, s, rows, p.in.output[kH]);
  activate_hidden<C>(in, s);
  measure_output<C>(in, s, rows, p.w_up);
  float* out = s.out[warp_index()];

  // The sums that the norm's gradient takes from each row: of dy' w, of dy' w hat(u), and of dy' b
  // for the row's dot. This lane's share, for its rows lane / 8 + 4 turn.
  float sum[4] = {}, dot_hat[4] = {}, dot[4] = {};
  project_to_columns<kUp, C>(in, s, p.w_up, member, [&](int first, const auto& sums) {
    for_each_8(out, rows, first, in.D, sums, [&](int turn, int row, int column, const Float8& u) {
      const Float8 dy = load_dropped<C>(p, rows.first + row, column);
      const Float8 hat = normed_output<C>(p, s, member, row, column, u);
      const Float8 weight = load_parameter_8<T>(in.parameter(kPostNormWeight), norm_at + column);
      const Float8 bias = load_parameter_8<T>(in.parameter(kPostNormBias), norm_at + column);
      for (int e = 0; e < 8; ++e) {
        sum[turn] += dy.v[e] * weight.v[e];
        dot_hat[turn] += dy.v[e] * weight.v[e] * hat.v[e];
        dot[turn] += dy.v[e] * bias.v[e];
      }
    });
  });
  for (int turn = 0; turn < 4; ++turn) {  // kVectors neighbouring lanes share a row
    sum[turn] = group_sum<kVectors>(sum[turn]);
    dot_hat[turn] = group_sum<kVectors>(dot_hat[turn]);
    dot[turn] = group_sum<kVectors>(dot[turn]);
    const int row = warp_index() * 16 + lane_index() / kVectors + 4 * turn;
    // dy' . (hat(u) w + b): the dot with the normed output.
    if (lane_index() % kVectors == 0) s.dot[row] = dot_hat[turn] + dot[turn];
  }

  // du = factor / deviation (dy' w - (sum + hat(u) dot_hat) / D), and the sums over rows of factor
  // dy' hat(u) and factor dy' for the norm's own gradients.
  project_to_columns<kUp, C>(in, s, p.w_up, member, [&](int first, const auto& sums) {
    ColumnSums columns;
    for_each_8(out, rows, first, in.D, sums, [&](int turn, int row, int column, const Float8& u) {
      const Float8 dy = load_dropped<C>(p, rows.first + row, column);
      const Float8 hat = normed_output<C>(p, s, member, row, column, u);
      const Float8 weight = load_parameter_8<T>(in.parameter(kPostNormWeight), norm_at + column);
      const float factor = s.rows.factor[row];  // scale g
      Float8 du;
      for (int e = 0; e < 8; ++e) {
        // Mean and deviation move with u: their parts are taken off.
        const float centred = dy.v[e] * weight.v[e] -
                              (sum[turn] + hat.v[e] * dot_hat[turn]) / static_cast<float>(in.D);
        du.v[e] = factor * s.out_rstd[row] * centred;
        columns.weight.v[e] += factor * dy.v[e] * hat.v[e];
        columns.bias.v[e] += factor * dy.v[e];
      }
      store_16(static_cast<T*>(p.du) + (rows.first + row) * in.D + column, narrow<T>(du));
    });
    leave_columns<C>(p, s, tile, C::Options::has_pre_norm(in) ? 1 : 0, first, columns);
  });
}

// A chunk of dy after dropout, or of du, [kBlockT, kChunk]; rows that are not there are zero.
template <class C>
__device__ __forceinline__ void stage_dy(const BackwardParams& p, const TileRows& rows,
                                         typename C::T* tile, int first) {
  using T = typename C::T;
  const Call& in = p.in;
  const T* source =
      static_cast<const T*>(C::Options::has_post_norm(in) ? p.du : in.doutput[kY]);  // [B * S, D]
  const bool drops =
      C::Options::has_dropout(in) && !C::Options::has_post_norm(in);  // du has passed through it
  for (int i = thread_index(); i < kBlockT * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * 8;
    const bool is_there = row < rows.count && first + column < in.D;
    T* to = tile + row * kChunkStride + column;
    if (!drops) {  // as it lies in memory
      const int64_t at = is_there ? (rows.first + row) * in.D + first + column : 0;
      cp_async_16(to, source + at, is_there);
    } else {
      const Float8 none = {};
      // What has to be computed comes through registers.
      store_16(to,
               narrow<T>(is_there ? load_dropped<C>(p, rows.first + row, first + column) : none));
    }
  }
}

// From the sums v of one rank block: dh in the place of h and in memory, a for the second launch,
// and this block's share of the dots.
template <class C>
__device__ __forceinline__ void put_hidden_gradient(const BackwardParams& p, Shared<C>& s,
                                                    const TileRows& rows, int rank,
                                                    const FragmentD (&v)[C::kRankTiles],
                                                    float (&dot)[2]) {
  using T = typename C::T;
  with_activation(p.in.activation, [&](auto phi) {
    constexpr Activation kPhi = decltype(phi)::value;
#pragma unroll
    for (int n = 0; n < C::kRankTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // a lane has two neighbours of each of two rows
        const int row = warp_index() * 16 + FragmentD::row(2 * half);
        const int column = rank + 8 * n + FragmentD::column(0);
        T* at = &s.hidden[row * C::kHiddenStride + column];
        const Float2 pair = unpack<T>(load_4(at));  // of h, whose place dh takes
        const float h[2] = {pair.low, pair.high};
        // With a post-norm v comes from du, which has the factor.
        const float factor = C::Options::has_post_norm(p.in) ? 1.0f : s.rows.factor[row];
        float dh[2] = {0.0f, 0.0f}, a[2] = {0.0f, 0.0f};  // also where no h was loaded
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // Rows and ranks that do not exist stay zero, or the next product would add them up.
          if (row >= rows.count || column + e >= p.in.R) continue;
          const float gradient = v[n].r[2 * half + e];
          const float phi_h = activate(kPhi, h[e]);
          // Rounded as forward's product took it, so that the dot is that of its u.
          dot[half] += gradient * to_float(round_to<T>(phi_h));
          a[e] = factor * phi_h;
          dh[e] = factor * through_activation(kPhi, gradient, h[e]);
        }
        store_4(at, pack<T>(dh[0], dh[1]));
        if (row >= rows.count || column >= p.rank_stride) continue;
        const int64_t to = (rows.first + row) * p.rank_stride + column;
        store_4(static_cast<T*>(p.dh) + to, pack<T>(dh[0], dh[1]));
        if (p.a != nullptr) store_4(static_cast<T*>(p.a) + to, pack<T>(a[0], a[1]));
      }
    }
  });
}

// s.hidden = dh, and the row's scalars, in shared and in global memory.
template <class C>
__device__ __forceinline__ void derive_hidden(const BackwardParams& p, Shared<C>& s,
                                              const TileRows& rows, int tile) {
  using T = typename C::T;
  const Call& in = p.in;
  if (C::Options::has_pre_norm(in) || C::Options::has_learned_gate(in)) {
    // Computed again from x: forward keeps neither statistics nor logits.
    measure_rows<typename C::Options, T>(in, rows, s.rows, C::Options::has_learned_gate(in));
  }
  settle_factors<C>(p, s, rows);
  if (C::Options::has_post_norm(in)) derive_output<C>(p, s, rows, tile);

  load_hidden<C>(in, s, rows, p.in.output[kH]);
  const int64_t member = up_member_of(in, rows);
  const bool has_bias_row = in.input[kBUp] != nullptr && !C::Options::has_post_norm(in);
  float dot[2] = {0.0f, 0.0f};  // of rows FragmentD::row(0) and row(2), this lane's ranks
  const FragmentD bias_dot = project_to_ranks<kUp, C>(
      in, s, p.w_up, member, ExtraRow{in.parameter(kBUp), member * in.D, has_bias_row},
      [&](T* to, int first) { stage_dy<C>(p, rows, to, first); },
      [&](int rank, const auto& v) { put_hidden_gradient<C>(p, s, rows, rank, v, dot); });
  for (int half = 0; half < 2; ++half) {
    const float whole = group_sum<4>(dot[half]);  // four lanes share a row
    if (FragmentD::column(0) == 0 && !C::Options::has_post_norm(in)) {
      // bias_dot is dy' . b_up, in the lanes that hold column 0.
      s.dot[warp_index() * 16 + FragmentD::row(2 * half)] = whole + bias_dot.r[2 * half];
    }
  }
  sync_threads();  // the dots are there; dh is since the product's own barrier
  // For the second launch, and for reload_tile.
  const int r = thread_index();
  if (r < rows.count) {
    *row_scalar(p, kDot, rows.first + r) = s.dot[r];
    if (C::Options::has_learned_gate(in)) *row_scalar(p, kLogit, rows.first + r) = s.rows.logit[r];
    if (C::Options::has_pre_norm(in) || C::Options::has_learned_gate(in)) {
      *row_scalar(p, kMean, rows.first + r) = s.rows.mean[r];
      *row_scalar(p, kRstd, rows.first + r) = s.rows.rstd[r];
    }
  }
  if (p.a != nullptr && r < rows.count) {
    const float factor = C::Options::has_post_norm(in) ? 1.0f : s.rows.factor[r];
    store_16(static_cast<T*>(p.factor_parts) + (rows.first + r) * kPartsStride,
             split_into_parts<T>(factor));
  }
  if (in.grad[kScale] != nullptr) leave_gated_dot<T, typename C::Options>(p, s.dot, rows, tile);
}

// Comes back to a tile that another one has replaced in shared memory.
template <class C>
__device__ __forceinline__ void reload_tile(const BackwardParams& p, Shared<C>& s,
                                            const TileRows& rows) {
  using T = typename C::T;
  const int r = thread_index();
  if (r < rows.count) {
    s.rows.logit[r] = *row_scalar(p, kLogit, rows.first + r);
    s.rows.mean[r] = *row_scalar(p, kMean, rows.first + r);
    s.rows.rstd[r] = *row_scalar(p, kRstd, rows.first + r);
  }
  const int vectors = rank_blocks_of<C>(p.in) * C::kRankBlock / 8;
  reload_dh<T, kBlockT, C::kHiddenStride>(p, rows, vectors, kThreads, s.hidden);
}

// Eight elements of (x - mean) / deviation.
template <class C>
__device__ __forceinline__ Float8 normed_input(const Call& in, const Shared<C>& s, int64_t at,
                                               int row) {
  Float8 x = load_8(in.input_as<typename C::T>(kX) + at);
  for (int e = 0; e < 8; ++e) x.v[e] = (x.v[e] - s.rows.mean[row]) * s.rows.rstd[row];
  return x;
}

// dx, and what the rows add to the pre-norm's own gradients.
template <class C>
__device__ __forceinline__ void derive_input(const BackwardParams& p, Shared<C>& s,
                                             const TileRows& rows, int tile) {
  using T = typename C::T;
  const Call& in = p.in;
  const int64_t member = down_member_of(in, rows), norm_at = pre_norm_at(in, member);
  float* out = s.out[warp_index()];
  // The sums that a pre-norm's gradient takes from each row of dz = dh W_down: of dz w and of dz w
  // hat(x). This lane's share, for its rows lane / 8 + 4 turn.
  float sum[4] = {}, dot_hat[4] = {};
  if (C::Options::has_pre_norm(in)) {
    project_to_columns<kDown, C>(in, s, p.w_down, member, [&](int first, const auto& sums) {
      ColumnSums columns;
      for_each_8(
          out, rows, first, in.D, sums, [&](int turn, int row, int column, const Float8& dz) {
            const Float8 hat = normed_input<C>(in, s, (rows.first + row) * in.D + column, row);
            const Float8 weight =
                load_parameter_8<T>(in.parameter(kPreNormWeight), norm_at + column);
            for (int e = 0; e < 8; ++e) {
              sum[turn] += dz.v[e] * weight.v[e];
              dot_hat[turn] += dz.v[e] * weight.v[e] * hat.v[e];
              // The norm's own gradients are the sums over rows of dz hat(x) and dz, without w.
              columns.weight.v[e] += dz.v[e] * hat.v[e];
              columns.bias.v[e] += dz.v[e];
            }
          });
      leave_columns<C>(p, s, tile, /*norm=*/0, first, columns);
    });
    for (int turn = 0; turn < 4; ++turn) {  // kVectors neighbouring lanes share a row
      sum[turn] = group_sum<kVectors>(sum[turn]);
      dot_hat[turn] = group_sum<kVectors>(dot_hat[turn]);
    }
  }
  if (in.grad[kX] == nullptr) return;  // nobody asked for dx: the norm's sums were all
  project_to_columns<kDown, C>(in, s, p.w_down, member, [&](int first, const auto& sums) {
    for_each_8(out, rows, first, in.D, sums, [&](int turn, int row, int column, Float8 dx) {
      const int64_t at = (rows.first + row) * in.D + column;
      if (C::Options::has_pre_norm(in)) {
        const Float8 hat = normed_input<C>(in, s, at, row);
        const Float8 weight = load_parameter_8<T>(in.parameter(kPreNormWeight), norm_at + column);
        for (int e = 0; e < 8; ++e) {
          // dx = (dz w - (sum + hat(x) dot_hat) / D) / deviation
          const float mean = (sum[turn] + hat.v[e] * dot_hat[turn]) / static_cast<float>(in.D);
          dx.v[e] = s.rows.rstd[row] * (dx.v[e] * weight.v[e] - mean);
        }
      }
      if (C::Options::has_learned_gate(in)) {
        const Float8 weight = load_parameter_8<T>(in.parameter(kGateWeight), column);
        // The gate sees x before the norm.
        for (int e = 0; e < 8; ++e) dx.v[e] += s.dlogit[row] * weight.v[e];
      }
      // x reached y as the residual too; another residual gets dy itself, outside of the kernels.
      if (in.residual_from == ResidualFrom::kInput) {
        const Float8 dy = load_8(p.in.doutput_as<T>(kY) + at);
        for (int e = 0; e < 8; ++e) dx.v[e] += dy.v[e];
      }
      store_16(p.in.grad_as<T>(kX) + at, narrow<T>(dx));
    });
  });
}

// dlogit and dx of a tile whose dh and dots, or sentence's dots, are there.
template <class C>
__device__ __forceinline__ void finish_tile(const BackwardParams& p, Shared<C>& s,
                                            const TileRows& rows, int tile) {
  if (C::Options::has_learned_gate(p.in)) {
    derive_logits<typename C::T, typename C::Options>(
        p, rows, tile, s.dot, s.pooled, s.dlogit, [&](int r) { return sigmoid(s.rows.logit[r]); });
  }
  derive_input<C>(p, s, rows, tile);  // ends with the barrier of its last product
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    gated_adapter_bwd_general_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Tiling& tiling = p.tiling;
  prepare_second_launch(p, kThreads);
  clear_extra_rows<C>(s);  // load_hidden's barrier comes before the first copy to their tiles

  for (int wave = 0; wave < tiling.tiles; wave += p.wave_tiles) {
    const int end = wave + p.wave_tiles < tiling.tiles ? wave + p.wave_tiles : tiling.tiles;
    // dh and the dots, and without a pooled gate the rest of each tile too.
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile<kBlockT>(tiling, tile);
      derive_hidden<C>(p, s, rows, tile);
      // dlogit needs the dots of the whole sentence.
      if (C::Options::has_pooled_gate(p.in)) {
        publish_dots(p, s.dot, rows, tile);
      } else {
        finish_tile<C>(p, s, rows, tile);
      }
      sync_threads();  // the next tile may replace what this one's threads have read of its rows
    }
    if (!C::Options::has_pooled_gate(p.in)) continue;
    // dx of the wave's tiles, each when its sentence's dots are known.
    const bool has_several = end - wave > grid_blocks_x();  // tiles for some block
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile<kBlockT>(tiling, tile);
      await_sums(tiling, tiling.tiles_per_group, p.gate_partial, p.arrivals, rows, s.pooled);
      // With one tile a block, its dh and rows are still in shared memory.
      if (has_several) reload_tile<C>(p, s, rows);
      finish_tile<C>(p, s, rows, tile);
    }
  }
}

using Configs = GeneralConfigsOf<Config>;

}  // namespace

void launch_bwd_general_sm80(const BackwardParams& p) {
  const bool found = run_first_fit_here<Shared>(
      Configs{}, [&](auto tag) { return serves<typename decltype(tag)::type>(p.in); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        launch_over_tiles<gated_adapter_bwd_general_sm80<C>>("gated_adapter_bwd_general_sm80", p,
                                                             kThreads, sizeof(Shared<C>));
      });
  check(found, "gated_adapter_bwd_general_sm80: expected a call that why_not serves, got ",
        name_of(p.in.dtype), " and R=", p.in.R);
}

}  // namespace pelt::gated_adapter
