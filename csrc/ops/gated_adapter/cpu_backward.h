// What the phases of gated_adapter's backward on the CPU hand to each other (fused_bwd_cpu.cpp).
#pragma once

#include <cstring>

#include "ops/gated_adapter/cpu_rows.h"

namespace pelt::gated_adapter {
namespace {

// A block of X, its rows of S and its sums stay in the first cache; at 128 x 128 they did not, and
// backward took 13 % longer (T = 1024, D = 768, R = 48, EPYC Zen 3).
constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kColumnsAtOnce = 64;
// Pairs take half the room.
constexpr int64_t kPairRowsAtOnce = 2 * kRowsAtOnce;

// S^T [R and two rows of weights, rows of all groups], for products over the rows. A group's rows
// begin at a multiple of kTileDepth, with zeros behind them.
struct Transposed {
  int64_t rank = 0, groups = 1, group_rows = 0;
  bf16* data = nullptr;

  int64_t pitch() const { return pair_depth(group_rows); }
  int64_t stride() const { return pair_distance(groups * pitch()); }
  int64_t rows() const { return round_up(rank + 2, kTileSide); }
  int64_t place(int64_t row) const { return row / group_rows * pitch() + row % group_rows; }
  void take(Arena& arena) { data = arena.take<bf16>(rows() * stride()); }

  // Zeros behind the rows of a group.
  void pad(int64_t group) {
    const size_t bytes = static_cast<size_t>(pitch() - group_rows) * sizeof(bf16);
    for (int64_t r = 0; r < rank + 2; ++r) {
      std::memset(data + r * stride() + group * pitch() + group_rows, 0, bytes);
    }
  }

  void put_weight(int64_t row, float weight) {
    bf16* to = data + rank * stride() + place(row);
    store_part(to, splat(weight), 1);
    const float rest = weight - to_float(*to);
    // Beside an infinity nothing is left out, not a NaN.
    store_part(to + stride(), splat(std::isfinite(rest) ? rest : 0.0f), 1);
  }
};

struct BackwardMemory {
  const Call& call;
  Tiles tiles;
  Parameters parameters;
  Weights up;                // for da
  Weights down;              // for dx
  Weights up_again;          // for u, with a post-norm
  float* dh = nullptr;       // [B * S + kRowUnit, rank_stride]
  float* fa = nullptr;       // the same: f a; a alone with a post-norm
  bf16* dh_pairs = nullptr;  // [B * S, pair_distance(R)], with pairs in the place of dh
  Transposed dh_transposed, fa_transposed;  // with pairs
  float* du = nullptr;                      // [B * S, padded width], with a post-norm
  float* factor = nullptr;                  // [B * S]: f; 1 with a post-norm
  float* dot = nullptr;                     // [B * S]: <dropped, post_norm(u)>
  float* row_gate = nullptr;      // [B * S] of a learned gate: each row's, before it is pooled
  float* dlogit = nullptr;        // [B * S]: the gradient of that gate's logit
  Moments* moments = nullptr;     // [B * S] of x, with a pre-norm
  float* post_partial = nullptr;  // [tiles, 2, padded width]: weight, bias
  float* column_sums = nullptr;   // [slots, 3, padded width]: gate_weight, pre_norm_weight and bias
  float* scratch = nullptr;
  int64_t scratch_floats = 0;
  bool by_pairs;  // products take bfloat16 as it is, on tiles

  // A post-norm's sums over a tile's rows must not depend on the number of threads.
  explicit BackwardMemory(const Call& c)
      : call(c),
        tiles(has_post_norm(c) ? cut_by(c, 24, 1) : cut_evenly(c)),
        by_pairs(uses_pairs(c)) {}

  int64_t width() const { return padded_width(call); }
  int64_t stride() const { return rank_stride(call); }

  void place(Arena& arena) {
    // Products read whole blocks of rows, also behind the last one.
    const int64_t rows = rows_of(call), some = rows + kRowUnit;
    parameters.place(call, arena);
    up = {kWUp, false, call.D, call.R};
    down = {kWDown, false, call.R, call.D};
    up_again = {kWUp, true, call.R, call.D};
    up.place(arena, parameters.up, by_pairs);
    down.place(arena, parameters.down, by_pairs);
    if (has_post_norm(call)) up_again.place(arena, parameters.up, by_pairs);
    if (by_pairs) {
      dh_pairs = arena.take<bf16>(rows * pair_distance(call.R));
      dh_transposed = fa_transposed = {call.R, tiles.groups, tiles.group_rows};
      dh_transposed.take(arena);
      fa_transposed.take(arena);
    } else {
      dh = arena.take(some * stride());
      fa = arena.take(some * stride());
    }
    du = arena.take(has_post_norm(call) ? rows * width() : 0);
    factor = arena.take(rows);
    dot = arena.take(rows);
    row_gate = arena.take(has_learned_gate(call) ? rows : 0);
    dlogit = arena.take(has_learned_gate(call) ? rows : 0);
    moments = reinterpret_cast<Moments*>(arena.take(has_pre_norm(call) ? 2 * rows : 0));
    post_partial = arena.take(has_post_norm(call) ? tiles.count() * 2 * width() : 0);
    column_sums = arena.take(parameters.down.slots * 3 * width());
    // A thread's scratch serves tiles of rows and columns of weights, one after the other.
    const int64_t whole = has_pre_norm(call) || has_post_norm(call) ? width() : 0;
    const int64_t of_rows =
        tiles.tile_rows * (stretch_floats() + operand_floats() + 1 + whole) + 2 * whole;
    const int64_t panel = by_pairs ? kPairRowsAtOnce / 2 : kRowsAtOnce;  // floats of a column
    const int64_t of_weights =
        kColumnsAtOnce * (panel + 3) +
        (round_up(call.R + 2, kPairBlockRows) + round_up(call.R, kRowUnit)) * (kColumnsAtOnce + 1);
    scratch_floats = round_up(std::max(of_rows, of_weights) + 64, 16);
    scratch = arena.take(scratch_floats * call.threads);
  }

  // Of a row of a tile: what the product with W_up reads, and its result with what else is [R].
  int64_t stretch_floats() const {
    if (!by_pairs) return kDepth;
    return has_post_norm(call) || has_dropout(call) ? pair_distance(call.D) / 2 : 0;
  }
  int64_t operand_floats() const {
    return by_pairs ? 2 * stride() + pair_distance(call.R) / 2 : stride();
  }
};

}  // namespace
}  // namespace pelt::gated_adapter
