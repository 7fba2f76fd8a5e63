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
// its partial sum and arrives at the sentence's counter, then waits for the others and adds the
// partial sums in their order. The launch is cooperative and blocks take whole sentences together
// (a wave), first all down projections, then all up projections, so nobody waits for a tile that is
// not being worked on. x is read once from memory, and once more from L2 when it is also the
// residual.
//
// Shared memory per block, R <= 16, 48, 64, 128, 512: 44, 58, 69, 105, 155 KB.
//
// Why so: T rows are 2 D bytes in and out for 4 D R operations, which is memory-bound below R =
// 180. The schedule keeps x moving (two chunks in flight for each of several blocks on a
// multiprocessor) and touches it once; nothing of size [T, D] exists between x and y.
#include "common/type_list.h"
#include "ops/gated_adapter/products.cuh"

namespace pelt::gated_adapter {
namespace {

// h + b_down of one rank block, from the warps' registers to shared memory.
template <class C>
__device__ __forceinline__ void put_hidden(const Inputs& in, Shared<C>& s, int64_t member, int rank,
                                           const FragmentD (&sums)[C::kRankTiles]) {
  using T = typename C::T;
  for (int n = 0; n < C::kRankTiles; ++n) {
    for (int half = 0; half < 2; ++half) {
      const int row = warp_index() * 16 + FragmentD::row(2 * half);
      const int column = rank + 8 * n + FragmentD::column(0);
      float value[2];
      for (int e = 0; e < 2; ++e) {
        const bool has_bias = in.b_down.data != nullptr && column + e < in.R;
        const float bias = has_bias ? load_rounded<T>(in.b_down, member * in.R + column + e) : 0.0f;
        value[e] = sums[n].r[2 * half + e] + bias;
      }
      store_4(&s.hidden[row * C::kHiddenStride + column], pack<T>(value[0], value[1]));
    }
  }
}

// hidden = W_down pre_norm(x) + b_down; and the gate's logits, where they ride along.
template <class C>
__device__ __forceinline__ void project_down(const Inputs& in, Shared<C>& s, const TileRows& rows,
                                             bool rides_gate) {
  using T = typename C::T;
  const int64_t member =
      member_of(in.down_index, in.has_down_index_per_sample, rows.group, in.down_members);
  const FragmentD logits = project_to_ranks<kDown, C>(
      in, s, in.w_down, member, Rider{in.gate_weight, 0, rides_gate},
      [&](T* tile, int first) { stage_x(tile, in, rows, s.rows, first); },
      [&](int rank, const FragmentD(&sums)[C::kRankTiles]) {
        put_hidden<C>(in, s, member, rank, sums);
      });
  if (rides_gate && FragmentD::column(0) == 0) {
    const float bias = load_parameter<T>(in.gate_bias, 0);
    s.rows.logit[warp_index() * 16 + FragmentD::row(0)] = logits.r[0] + bias;
    s.rows.logit[warp_index() * 16 + FragmentD::row(2)] = logits.r[2] + bias;
  }
  sync_threads();
}

// Eight neighbouring elements of residual + scale g dropout(post_norm(u)).
template <class C>
__device__ __forceinline__ void store_y_8(const ForwardParams& p, const Shared<C>& s,
                                          const TileRows& rows, int64_t member, int row, int column,
                                          Float8 u) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int64_t at = (rows.first + row) * in.D + column;
  if (in.b_up.data != nullptr) {
    const Float8 bias = load_parameter_8<T>(in.b_up, member * in.D + column);
    for (int e = 0; e < 8; ++e) u.v[e] += bias.v[e];
  }
  if (in.has_post_norm()) {
    const Float8 weight = load_parameter_8<T>(in.post_norm_weight, column);
    const Float8 bias = load_parameter_8<T>(in.post_norm_bias, column);
    for (int e = 0; e < 8; ++e) {
      u.v[e] = (u.v[e] - s.out_mean[row]) * s.out_rstd[row] * weight.v[e] + bias.v[e];
    }
  }
  if (in.dropout.is_active()) {
    const Float8 factors = dropout_of(in, rows.first + row, column);
    for (int e = 0; e < 8; ++e) u.v[e] *= factors.v[e];
  }
  Float8 residual = {};
  if (in.residual_from != ResidualFrom::kNone) {
    const void* from = in.residual_from == ResidualFrom::kInput ? in.x : in.residual;
    residual = load_8(static_cast<const T*>(from) + at);
  }
  // A row that is skipped is not made of u, whatever it holds.
  const float factor = s.rows.factor[row];
  const bool is_skipped = in.has_skip && factor == 0.0f;
  for (int e = 0; e < 8; ++e) u.v[e] = residual.v[e] + (is_skipped ? 0.0f : factor * u.v[e]);
  store_16(static_cast<T*>(p.y) + at, narrow<T>(u));
}

template <class C>
__device__ __forceinline__ void store_y(const ForwardParams& p, Shared<C>& s,
                                        const TileRows& rows) {
  const int64_t member =
      member_of(p.in.up_index, p.in.has_up_index_per_sample, rows.group, p.in.up_members);
  project_to_columns<kUp, C>(
      p.in, s, p.in.w_up, member, [&](int first, const FragmentD(&sums)[kChunk / 8]) {
        for_each_8<C>(p.in, s, rows, first, sums, [&](int, int row, int column, const Float8& u) {
          store_y_8<C>(p, s, rows, member, row, column, u);
        });
      });
}

// y = residual for a tile all of whose gates are below the threshold: no product is computed.
template <class C>
__device__ __forceinline__ void copy_residual(const ForwardParams& p, const TileRows& rows) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const void* from = in.residual_from == ResidualFrom::kInput ? in.x : in.residual;
  for (int i = thread_index(); i < rows.count * (in.D / 8); i += kThreads) {
    const int64_t at = rows.first * in.D + static_cast<int64_t>(i) * 8;
    Words4 words = {};
    if (in.residual_from != ResidualFrom::kNone) {
      words = load_global_16(static_cast<const T*>(from) + at);
    }
    store_16(static_cast<T*>(p.y) + at, words);
  }
}

// The tile's share of its sentence's gate.
template <class C>
__device__ __forceinline__ void publish_gate(const ForwardParams& p, const Shared<C>& s,
                                             const TileRows& rows, int tile) {
  if (warp_index() != 0) return;
  float sum = 0.0f, count = 0.0f;
  for (int r = lane_index(); r < rows.count; r += 32) {
    const bool counts = p.in.pooling == Pooling::kMean || p.in.mask[rows.first + r];
    sum += counts ? sigmoid(s.rows.logit[r]) : 0.0f;
    count += counts ? 1.0f : 0.0f;
  }
  publish_sums(p.gate_partial, p.arrivals, rows, tile, sum, count);
}

template <class C>
__device__ __forceinline__ void await_gate(const ForwardParams& p, Shared<C>& s,
                                           const TileRows& rows) {
  await_sums<C>(p.tiling, p.gate_partial, p.arrivals, s, rows);
  if (rows.index_in_group == 0 && thread_index() == 0) {
    p.gate_value[rows.group] = s.pooled[0] / s.pooled[1];
  }
}

// factor = scale g of each row, and whether any row of the tile is alive.
template <class C>
__device__ __forceinline__ void settle_factors(const ForwardParams& p, Shared<C>& s,
                                               const TileRows& rows) {
  using T = typename C::T;
  const Inputs& in = p.in;
  if (warp_index() == 0) {
    const float scale = scale_of<T>(in);
    bool any_lives = false;
    for (int r = lane_index(); r < kBlockT; r += 32) {
      float gate = 0.0f;
      if (r < rows.count && in.has_pooled_gate()) {
        gate = s.pooled[0] / s.pooled[1];
      } else if (r < rows.count && in.has_learned_gate()) {
        gate = sigmoid(s.rows.logit[r]);
        p.gate_value[rows.first + r] = gate;
      } else if (r < rows.count) {
        gate = gate_of_row<T>(in, nullptr, rows.first + r);
      }
      const bool is_skipped = in.has_skip && gate < in.skip_below;
      any_lives |= r < rows.count && !is_skipped;
      s.rows.factor[r] = is_skipped ? 0.0f : scale * gate;
    }
    any_lives = vote_any(any_lives);
    if (lane_index() == 0) s.live_rows = any_lives ? 1 : 0;
  }
  sync_threads();
}

// What a tile still needs before its up projection.
enum class Hidden { kIsThere, kIsInMemory, kIsNotComputed };

template <class C>
__device__ __forceinline__ void finish_tile(const ForwardParams& p, Shared<C>& s,
                                            const TileRows& rows, Hidden hidden) {
  settle_factors<C>(p, s, rows);
  if (s.live_rows == 0) {
    copy_residual<C>(p, rows);
  } else {
    if (hidden == Hidden::kIsInMemory) load_hidden<C>(p.in, s, rows, p.h);
    if (hidden == Hidden::kIsNotComputed) {
      if (p.in.has_pre_norm()) measure_rows<typename C::T>(p.in, rows, s.rows, false);
      sync_threads();
      project_down<C>(p.in, s, rows, /*rides_gate=*/false);
      store_hidden<C>(p.in, s, rows, p.h);
    }
    activate_hidden<C>(p.in, s);
    if (p.in.has_post_norm()) measure_output<C>(p.in, s, rows);
    store_y<C>(p, s, rows);
  }
  sync_threads();
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    gated_adapter_fwd_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Tiling& tiling = p.tiling;
  const bool is_learned = p.in.has_learned_gate();
  const bool is_pooled = p.in.has_pooled_gate();
  // A gate that decides whether to project at all must be known before; and beside a pre-norm the
  // tile in shared memory is not x.
  const bool projects_late = p.in.has_skip;
  const bool rides_gate = is_learned && !projects_late && !p.in.has_pre_norm();
  const bool measures = p.in.has_pre_norm() || (is_learned && !rides_gate);
  clear_rider<C>(s);
  sync_threads();

  for (int wave = 0; wave < tiling.tiles; wave += tiling.wave_tiles) {
    const int end =
        wave + tiling.wave_tiles < tiling.tiles ? wave + tiling.wave_tiles : tiling.tiles;
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile(tiling, tile);
      if (measures) {
        measure_rows<typename C::T>(p.in, rows, s.rows, is_learned && !rides_gate);
        sync_threads();
      }
      if (!projects_late) {
        project_down<C>(p.in, s, rows, rides_gate);
        store_hidden<C>(p.in, s, rows, p.h);
      }
      if (is_pooled) {
        publish_gate<C>(p, s, rows, tile);
      } else {
        finish_tile<C>(p, s, rows, projects_late ? Hidden::kIsNotComputed : Hidden::kIsThere);
      }
      sync_threads();
    }
    if (!is_pooled) continue;
    const bool has_several = end - wave > grid_blocks_x();
    for (int tile = wave + block_index_x(); tile < end; tile += grid_blocks_x()) {
      const TileRows rows = rows_of_tile(tiling, tile);
      await_gate<C>(p, s, rows);
      finish_tile<C>(p, s, rows,
                     projects_late ? Hidden::kIsNotComputed
                                   : (has_several ? Hidden::kIsInMemory : Hidden::kIsThere));
    }
  }
}

// Dtype and smallest rank that fits.
using Configs = TypeList<Config<bf16, 16, 16>, Config<bf16, 48, 48>, Config<bf16, 64, 64>,
                         Config<bf16, 128, 128>, Config<bf16, 128, 512>, Config<f16, 16, 16>,
                         Config<f16, 48, 48>, Config<f16, 64, 64>, Config<f16, 128, 128>,
                         Config<f16, 128, 512>>;

template <class C>
void launch_config(ForwardParams& p, void* workspace, Stream stream) {
  constexpr auto kKernel = gated_adapter_fwd_sm80<C>;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<C>);
  const int resident = resident_blocks<kKernel>(kThreads, shape.shared_bytes);
  shape.blocks_x = p.tiling.tiles < resident ? p.tiling.tiles : resident;
  shape.is_cooperative = p.in.has_pooled_gate();
  p.tiling.wave_tiles = p.tiling.tiles;
  if (p.in.has_pooled_gate()) {
    p.tiling.wave_tiles = wave_of(p.tiling, shape.blocks_x);
    p.arrivals = static_cast<int*>(workspace);
    p.gate_partial = reinterpret_cast<float*>(p.arrivals + p.in.B);
    zero_async(p.arrivals, sizeof(int) * p.in.B, stream);
  }
  launch<kKernel>("gated_adapter_fwd_sm80", shape, stream, p);
}

}  // namespace

Tiling make_tiling(const Inputs& in) {
  Tiling tiling;
  const bool is_per_sentence =
      in.has_pooled_gate() || in.has_down_index_per_sample || in.has_up_index_per_sample;
  tiling.groups = is_per_sentence ? in.B : 1;
  tiling.group_rows = is_per_sentence ? in.S : static_cast<int64_t>(in.B) * in.S;
  tiling.tiles_per_group = static_cast<int>((tiling.group_rows + kBlockT - 1) / kBlockT);
  tiling.tiles = tiling.groups * tiling.tiles_per_group;
  tiling.wave_tiles = tiling.tiles;
  return tiling;
}

int64_t forward_workspace_bytes(const Inputs& in) {
  if (!in.has_pooled_gate()) return 0;
  return static_cast<int64_t>(sizeof(int)) * in.B + 2 * sizeof(float) * make_tiling(in).tiles;
}

void launch_gated_adapter_fwd_sm80(ForwardParams p, void* workspace, Stream stream) {
  p.tiling = make_tiling(p.in);
  const bool found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && p.in.R <= C::kRanks;
      },
      [&](auto tag) { launch_config<typename decltype(tag)::type>(p, workspace, stream); });
  check(found, "gated_adapter_fwd_sm80: expected bfloat16 or float16 and R <= ", kMaxRank, ", got ",
        name_of(p.in.dtype), " and R=", p.in.R);
}

}  // namespace pelt::gated_adapter
