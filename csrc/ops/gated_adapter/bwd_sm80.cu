// gated_adapter, backward, first of two launches: what belongs to rows. With dy' = dropout(dy) and
// u = W_up phi(h) + b_up:
//
//   v   = dy' W_up                            [T, R]   one read of dy
//   dot = v . phi(h) + dy' . b_up             [T]      equals dy' . u, without computing u
//   dh  = scale g v phi'(h)                   [T, R]   to memory, for the second launch
//   dx  = dh W_down + dlogit w_gate + dy      [T, D]   through the pre-norm, if there is one
//
// dlogit comes from the dots: those of the row (token), or of the whole sentence (pooled); then
// tiles wait for their sentence as in forward. b_up rides along as one more column of W_up, so its
// share of the dot costs one mma for each 16 columns.
//
// With a post-norm u is needed after all: it is computed three times from h (for the row's mean and
// deviation, for the two sums of the norm's gradient, for du), du goes to memory, and from there on
// it takes the place of scale g dy'. A pre-norm needs two sums of each row of dh W_down before the
// first element of dx, so that product is done twice. The norms' own gradients are sums over rows:
// each warp leaves the sum over its 16 rows, the second launch adds them up in order.
//
// Tiles, ring and shared memory are forward's (products.cuh). Read: dy, h, and x for a learned gate
// or a pre-norm; written: dx, dh.
#include "common/type_list.h"
#include "ops/gated_adapter/products.cuh"

namespace pelt::gated_adapter {
namespace {

// da phi'(h). Where relu has no slope it lets nothing through, not even a NaN.
__device__ __forceinline__ float through_activation(Activation phi, float da, float h) {
  if (phi == Activation::kRelu) return h <= 0.0f ? 0.0f : da;
  return da * activation_derivative(phi, h);
}

// The sums over a warp's 16 rows of two quantities, for this lane's eight columns.
struct ColumnSums {
  Float8 weight = {};
  Float8 bias = {};

  // Adds the four lanes that share the columns and leaves the sums in memory: [2, D].
  __device__ __forceinline__ void leave(float* partial, int D, int first) {
    const int column = first + lane_index() % kVectors * 8;
    for (int e = 0; e < 8; ++e) {
      for (int mask = kVectors; mask < 32; mask *= 2) {
        weight.v[e] += shfl_xor(weight.v[e], mask);
        bias.v[e] += shfl_xor(bias.v[e], mask);
      }
      if (lane_index() < kVectors && column < D) {
        partial[column + e] = weight.v[e];
        partial[D + column + e] = bias.v[e];
      }
    }
  }
};

// Where a warp leaves its sums for a norm; `norm` counts the norms that are there.
__device__ __forceinline__ float* norm_slot(const BackwardParams& p, int tile, int norm) {
  const int norms = (p.in.has_pre_norm() ? 1 : 0) + (p.in.has_post_norm() ? 1 : 0);
  const int64_t warp = static_cast<int64_t>(tile) * kWarps + warp_index();
  return p.norm_partial + (warp * norms + norm) * 2 * p.in.D;
}

__device__ __forceinline__ float* row_scalar(const BackwardParams& p, RowScalar which) {
  return p.row_scalars + static_cast<int64_t>(which) * p.in.B * p.in.S;
}

template <class C>
__device__ __forceinline__ void settle_factors(const BackwardParams& p, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const int r = thread_index();
  if (r < kBlockT) {
    const bool is_there = r < rows.count;
    s.rows.factor[r] =
        is_there ? scale_of<T>(p.in) * gate_of_row<T>(p.in, p.gate_value, rows.first + r) : 0.0f;
  }
  sync_threads();
}

// Eight elements of dy after dropout.
template <class T>
__device__ __forceinline__ Float8 load_dropped(const BackwardParams& p, int64_t row, int column) {
  Float8 values = load_8(static_cast<const T*>(p.dy) + row * p.in.D + column);
  if (p.in.dropout.is_active()) {
    const Float8 factors = dropout_of(p.in, row, column);
    for (int e = 0; e < 8; ++e) values.v[e] *= factors.v[e];
  }
  return values;
}

// Eight elements of the normed output (u + b_up - mean) / deviation, from those of W_up phi(h).
template <class C>
__device__ __forceinline__ Float8 normed_output(const BackwardParams& p, const Shared<C>& s,
                                                int64_t member, int row, int column, Float8 u) {
  Float8 bias = {};
  if (p.in.b_up.data != nullptr) {
    bias = load_parameter_8<typename C::T>(p.in.b_up, member * p.in.D + column);
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
  const Inputs& in = p.in;
  const int64_t member =
      member_of(in.up_index, in.has_up_index_per_sample, rows.group, in.up_members);
  load_hidden<C>(in, s, rows, p.h);
  activate_hidden<C>(in, s);
  measure_output<C>(in, s, rows);

  float sum[4] = {}, dot_hat[4] = {}, dot[4] = {};  // of this lane's rows lane / 8 + 4 turn
  project_to_columns<kUp, C>(in, s, in.w_up, member, [&](int first, const auto& sums) {
    for_each_8<C>(in, s, rows, first, sums, [&](int turn, int row, int column, const Float8& u) {
      const Float8 dy = load_dropped<T>(p, rows.first + row, column);
      const Float8 hat = normed_output<C>(p, s, member, row, column, u);
      const Float8 weight = load_parameter_8<T>(in.post_norm_weight, column);
      const Float8 bias = load_parameter_8<T>(in.post_norm_bias, column);
      for (int e = 0; e < 8; ++e) {
        sum[turn] += dy.v[e] * weight.v[e];
        dot_hat[turn] += dy.v[e] * weight.v[e] * hat.v[e];
        dot[turn] += dy.v[e] * bias.v[e];
      }
    });
  });
  for (int turn = 0; turn < 4; ++turn) {
    sum[turn] = group_sum<kVectors>(sum[turn]);
    dot_hat[turn] = group_sum<kVectors>(dot_hat[turn]);
    dot[turn] = group_sum<kVectors>(dot[turn]);
    const int row = warp_index() * 16 + lane_index() / kVectors + 4 * turn;
    if (lane_index() % kVectors == 0) s.dot[row] = dot_hat[turn] + dot[turn];
  }

  project_to_columns<kUp, C>(in, s, in.w_up, member, [&](int first, const auto& sums) {
    ColumnSums columns;
    for_each_8<C>(in, s, rows, first, sums, [&](int turn, int row, int column, const Float8& u) {
      const Float8 dy = load_dropped<T>(p, rows.first + row, column);
      const Float8 hat = normed_output<C>(p, s, member, row, column, u);
      const Float8 weight = load_parameter_8<T>(in.post_norm_weight, column);
      const float factor = s.rows.factor[row];
      Float8 du;
      for (int e = 0; e < 8; ++e) {
        const float centred = dy.v[e] * weight.v[e] -
                              (sum[turn] + hat.v[e] * dot_hat[turn]) / static_cast<float>(in.D);
        du.v[e] = factor * s.out_rstd[row] * centred;
        columns.weight.v[e] += factor * dy.v[e] * hat.v[e];
        columns.bias.v[e] += factor * dy.v[e];
      }
      store_16(static_cast<T*>(p.du) + (rows.first + row) * in.D + column, narrow<T>(du));
    });
    columns.leave(norm_slot(p, tile, in.has_pre_norm() ? 1 : 0), in.D, first);
  });
}

// A chunk of dy after dropout, or of du, [kBlockT, kChunk]; rows that are not there are zero.
template <class C>
__device__ __forceinline__ void stage_dy(const BackwardParams& p, const TileRows& rows,
                                         typename C::T* tile, int first) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const T* source = static_cast<const T*>(in.has_post_norm() ? p.du : p.dy);  // [B * S, D]
  const bool drops = in.dropout.is_active() && !in.has_post_norm();
  for (int i = thread_index(); i < kBlockT * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * 8;
    const bool is_there = row < rows.count && first + column < in.D;
    T* to = tile + row * kChunkStride + column;
    if (!drops) {
      const int64_t at = is_there ? (rows.first + row) * in.D + first + column : 0;
      cp_async_16(to, source + at, is_there);
    } else {
      const Float8 none = {};
      store_16(to,
               narrow<T>(is_there ? load_dropped<T>(p, rows.first + row, first + column) : none));
    }
  }
}

// From the sums v of one rank block: dh in the place of h, and this block's share of the dots.
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
      for (int half = 0; half < 2; ++half) {
        const int row = warp_index() * 16 + FragmentD::row(2 * half);
        const int column = rank + 8 * n + FragmentD::column(0);
        T* at = &s.hidden[row * C::kHiddenStride + column];
        const Float2 pair = unpack<T>(load_4(at));
        const float h[2] = {pair.low, pair.high};
        const float factor = p.in.has_post_norm() ? 1.0f : s.rows.factor[row];
        float dh[2] = {0.0f, 0.0f};  // also where no h was loaded
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (row >= rows.count || column + e >= p.in.R) continue;
          const float gradient = v[n].r[2 * half + e];
          dot[half] += gradient * to_float(round_to<T>(activate(kPhi, h[e])));
          dh[e] = factor * through_activation(kPhi, gradient, h[e]);
        }
        store_4(at, pack<T>(dh[0], dh[1]));
      }
    }
  });
}

// s.hidden = dh, and the row's scalars, in shared and in global memory.
template <class C>
__device__ __forceinline__ void derive_hidden(const BackwardParams& p, Shared<C>& s,
                                              const TileRows& rows, int tile) {
  using T = typename C::T;
  const Inputs& in = p.in;
  if (in.has_pre_norm() || in.has_learned_gate()) {
    measure_rows<T>(in, rows, s.rows, in.has_learned_gate());
  }
  settle_factors<C>(p, s, rows);
  if (in.has_post_norm()) derive_output<C>(p, s, rows, tile);

  load_hidden<C>(in, s, rows, p.h);
  const int64_t member =
      member_of(in.up_index, in.has_up_index_per_sample, rows.group, in.up_members);
  const bool has_bias = in.b_up.data != nullptr;
  float dot[2] = {0.0f, 0.0f};
  const FragmentD bias_dot = project_to_ranks<kUp, C>(
      in, s, in.w_up, member, Rider{in.b_up, member * in.D, has_bias && !in.has_post_norm()},
      [&](T* to, int first) { stage_dy<C>(p, rows, to, first); },
      [&](int rank, const auto& v) { put_hidden_gradient<C>(p, s, rows, rank, v, dot); });
  for (int half = 0; half < 2; ++half) {
    const float whole = group_sum<4>(dot[half]);
    if (FragmentD::column(0) == 0 && !in.has_post_norm()) {
      s.dot[warp_index() * 16 + FragmentD::row(2 * half)] = whole + bias_dot.r[2 * half];
    }
  }
  sync_threads();
  store_hidden<C>(in, s, rows, p.dh);
  const int r = thread_index();
  if (r < rows.count) {
    row_scalar(p, kFactor)[rows.first + r] = in.has_post_norm() ? 1.0f : s.rows.factor[r];
    row_scalar(p, kDot)[rows.first + r] = s.dot[r];
    row_scalar(p, kLogit)[rows.first + r] = s.rows.logit[r];
    row_scalar(p, kMean)[rows.first + r] = s.rows.mean[r];
    row_scalar(p, kRstd)[rows.first + r] = s.rows.rstd[r];
  }
}

template <class C>
__device__ __forceinline__ void publish_dots(const BackwardParams& p, const Shared<C>& s,
                                             const TileRows& rows, int tile) {
  if (warp_index() != 0) return;
  float sum = 0.0f, count = 0.0f;
  for (int r = lane_index(); r < rows.count; r += 32) {
    sum += s.dot[r];
    count += p.in.pooling == Pooling::kMean || p.in.mask[rows.first + r] ? 1.0f : 0.0f;
  }
  publish_sums(p.gate_partial, p.arrivals, rows, tile, sum, count);
}

// Comes back to a tile that another one has replaced in shared memory.
template <class C>
__device__ __forceinline__ void reload_tile(const BackwardParams& p, Shared<C>& s,
                                            const TileRows& rows) {
  const int r = thread_index();
  if (r < rows.count) {
    s.rows.logit[r] = row_scalar(p, kLogit)[rows.first + r];
    s.rows.mean[r] = row_scalar(p, kMean)[rows.first + r];
    s.rows.rstd[r] = row_scalar(p, kRstd)[rows.first + r];
  }
  load_hidden<C>(p.in, s, rows, p.dh);
}

// logit = d loss / d logit of each row, for a learned gate.
template <class C>
__device__ __forceinline__ void derive_logits(const BackwardParams& p, Shared<C>& s,
                                              const TileRows& rows) {
  const int r = thread_index();
  if (r < rows.count) {
    const int64_t row = rows.first + r;
    const float gate = sigmoid(s.rows.logit[r]);
    float share = s.dot[r];
    if (p.in.has_pooled_gate()) {
      const bool counts = p.in.pooling == Pooling::kMean || p.in.mask[row];
      share = counts ? s.pooled[0] / s.pooled[1] : 0.0f;
    }
    s.rows.logit[r] = scale_of<typename C::T>(p.in) * share * gate * (1.0f - gate);
    row_scalar(p, kLogit)[row] = s.rows.logit[r];
  }
  sync_threads();
}

// Eight elements of (x - mean) / deviation.
template <class C>
__device__ __forceinline__ Float8 normed_input(const Inputs& in, const Shared<C>& s, int64_t at,
                                               int row) {
  Float8 x = load_8(static_cast<const typename C::T*>(in.x) + at);
  for (int e = 0; e < 8; ++e) x.v[e] = (x.v[e] - s.rows.mean[row]) * s.rows.rstd[row];
  return x;
}

// dx, and what the rows add to the pre-norm's own gradients.
template <class C>
__device__ __forceinline__ void derive_input(const BackwardParams& p, Shared<C>& s,
                                             const TileRows& rows, int tile) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int64_t member =
      member_of(in.down_index, in.has_down_index_per_sample, rows.group, in.down_members);
  float sum[4] = {}, dot_hat[4] = {};  // of this lane's rows lane / 8 + 4 turn
  if (in.has_pre_norm()) {
    project_to_columns<kDown, C>(in, s, in.w_down, member, [&](int first, const auto& sums) {
      ColumnSums columns;
      for_each_8<C>(in, s, rows, first, sums, [&](int turn, int row, int column, const Float8& dz) {
        const Float8 hat = normed_input<C>(in, s, (rows.first + row) * in.D + column, row);
        const Float8 weight = load_parameter_8<T>(in.pre_norm_weight, column);
        for (int e = 0; e < 8; ++e) {
          sum[turn] += dz.v[e] * weight.v[e];
          dot_hat[turn] += dz.v[e] * weight.v[e] * hat.v[e];
          columns.weight.v[e] += dz.v[e] * hat.v[e];
          columns.bias.v[e] += dz.v[e];
        }
      });
      columns.leave(norm_slot(p, tile, 0), in.D, first);
    });
    for (int turn = 0; turn < 4; ++turn) {
      sum[turn] = group_sum<kVectors>(sum[turn]);
      dot_hat[turn] = group_sum<kVectors>(dot_hat[turn]);
    }
  }
  if (p.dx == nullptr) return;
  project_to_columns<kDown, C>(in, s, in.w_down, member, [&](int first, const auto& sums) {
    for_each_8<C>(in, s, rows, first, sums, [&](int turn, int row, int column, Float8 dx) {
      const int64_t at = (rows.first + row) * in.D + column;
      if (in.has_pre_norm()) {
        const Float8 hat = normed_input<C>(in, s, at, row);
        const Float8 weight = load_parameter_8<T>(in.pre_norm_weight, column);
        for (int e = 0; e < 8; ++e) {
          const float mean = (sum[turn] + hat.v[e] * dot_hat[turn]) / static_cast<float>(in.D);
          dx.v[e] = s.rows.rstd[row] * (dx.v[e] * weight.v[e] - mean);
        }
      }
      if (in.has_learned_gate()) {
        const Float8 weight = load_parameter_8<T>(in.gate_weight, column);
        for (int e = 0; e < 8; ++e) dx.v[e] += s.rows.logit[row] * weight.v[e];
      }
      if (in.residual_from == ResidualFrom::kInput) {
        const Float8 dy = load_8(static_cast<const T*>(p.dy) + at);
        for (int e = 0; e < 8; ++e) dx.v[e] += dy.v[e];
      }
      store_16(static_cast<T*>(p.dx) + at, narrow<T>(dx));
    });
  });
}

template <class C>
__device__ __forceinline__ void finish_tile(const BackwardParams& p, Shared<C>& s,
                                            const TileRows& rows, int tile) {
  if (p.in.has_learned_gate()) derive_logits<C>(p, s, rows);
  derive_input<C>(p, s, rows, tile);
  sync_threads();
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    gated_adapter_bwd_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Tiling& tiling = p.tiling;
  clear_rider<C>(s);
  sync_threads();

  for (int wave = 0; wave < tiling.tiles; wave += tiling.wave_tiles) {
    const int end =
        wave + tiling.wave_tiles < tiling.tiles ? wave + tiling.wave_tiles : tiling.tiles;
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile(tiling, tile);
      derive_hidden<C>(p, s, rows, tile);
      if (p.in.has_pooled_gate()) {
        publish_dots<C>(p, s, rows, tile);
      } else {
        finish_tile<C>(p, s, rows, tile);
      }
      sync_threads();
    }
    if (!p.in.has_pooled_gate()) continue;
    const bool has_several = end - wave > grid_blocks_x();
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile(tiling, tile);
      await_sums<C>(tiling, p.gate_partial, p.arrivals, s, rows);
      if (has_several) reload_tile<C>(p, s, rows);
      finish_tile<C>(p, s, rows, tile);
    }
  }
}

using Configs = TypeList<Config<bf16, 16, 16>, Config<bf16, 48, 48>, Config<bf16, 64, 64>,
                         Config<bf16, 128, 128>, Config<bf16, 128, 512>, Config<f16, 16, 16>,
                         Config<f16, 48, 48>, Config<f16, 64, 64>, Config<f16, 128, 128>,
                         Config<f16, 128, 512>>;

template <class C>
void launch_config(BackwardParams& p, Stream stream) {
  constexpr auto kKernel = gated_adapter_bwd_sm80<C>;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<C>);
  const int resident = resident_blocks<kKernel>(kThreads, shape.shared_bytes);
  shape.blocks_x = p.tiling.tiles < resident ? p.tiling.tiles : resident;
  shape.is_cooperative = p.in.has_pooled_gate();
  if (p.in.has_pooled_gate()) p.tiling.wave_tiles = wave_of(p.tiling, shape.blocks_x);
  launch<kKernel>("gated_adapter_bwd_sm80", shape, stream, p);
}

}  // namespace

int64_t backward_workspace_bytes(const Inputs& in) { return plan_backward(in).total_bytes; }

void launch_gated_adapter_bwd_sm80(BackwardParams p, void* workspace, Stream stream) {
  const BackwardPlan plan = plan_backward(p.in);
  char* base = static_cast<char*>(workspace);
  p.tiling = plan.tiling;
  p.splits = plan.splits;
  p.arrivals = reinterpret_cast<int*>(base + plan.arrivals);
  p.tickets = p.arrivals + p.in.B;
  p.gate_partial = reinterpret_cast<float*>(base + plan.gate_partial);
  p.row_scalars = reinterpret_cast<float*>(base + plan.row_scalars);
  p.norm_partial = reinterpret_cast<float*>(base + plan.norm_partial);
  p.weight_partial = reinterpret_cast<float*>(base + plan.weight_partial);
  p.dh = base + plan.dh;
  p.du = base + plan.du;
  zero_async(p.arrivals, static_cast<size_t>(plan.zeroed_bytes), stream);
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && p.in.R <= C::kRanks;
      },
      [&](auto tag) { launch_config<typename decltype(tag)::type>(p, stream); });
  check(found, "gated_adapter_bwd_sm80: expected bfloat16 or float16 and R <= ", kMaxRank, ", got ",
        name_of(p.in.dtype), " and R=", p.in.R);
  launch_gated_adapter_bwd_weights_sm80(p, plan, stream);
}

}  // namespace pelt::gated_adapter
