// What the host does around the kernels: it says which calls they serve, cuts rows into tiles, lays
// out the workspace and puts the launches in order.
//
//   both       round          weights in float32 -> the same in the activation's type
//   forward    fwd            x -> h, gate_value, y
//   backward   bwd_rows       x, dy, h -> dx, and in the workspace dh, du, each row's scalars
//              bwd_weights    x, dy, h and those -> the gradients of parameters
//
// There is one family of kernels, for sm_80 and everything after it.
#include <algorithm>

#include "common/arena.h"
#include "common/check.h"
#include "ops/gated_adapter/backward_configs.h"

namespace pelt::gated_adapter {
namespace {

// Of a configuration what why_not asks for.
template <class T_, int, int kRanks_, class>
struct Capacity {
  using T = T_;
  static constexpr int kRanks = kRanks_;
};

template <class... Configs>
constexpr int largest_rank(TypeList<Configs...>) {
  int largest = 0;
  ((largest = Configs::kRanks > largest ? Configs::kRanks : largest), ...);
  return largest;
}

// Forward's tiles are as tall as the kernel that serves the call has them.
int forward_rows(const Call& in) {
  int rows = kBlockT;
  run_first_fit(
      StreamConfigs{}, [&](auto tag) { return serves_forward<typename decltype(tag)::type>(in); },
      [&](auto tag) { rows = decltype(tag)::type::kTileRows; });
  return rows;
}

// Backward's likewise.
int backward_rows(const Call& in) {
  int rows = kBlockT;
  run_first_fit(
      BackwardConfigs{},
      [&](auto tag) { return serves_backward<typename decltype(tag)::type>(in); },
      [&](auto tag) { rows = decltype(tag)::type::kTileRows; });
  return rows;
}

// A weight as the kernels' products take it: the call's own, or a place for it rounded, which
// `round` gets to fill.
const void* in_activation_type(const Call& call, Input which, int members, Arena& arena,
                               RoundParams::Weight& round) {
  if (!call.is_float32[which]) return call.input[which];
  round.from = call.input_as<float>(which);
  round.count = static_cast<int64_t>(members) * call.R * call.D;
  round.to = arena.take<uint16_t>(round.count);
  return round.to;
}

// The cut into tiles, and the pieces of forward's workspace in their places.
ForwardParams forward_params(const Call& call, Arena& arena, RoundParams& round) {
  ForwardParams p;
  p.in = call;
  p.w_down = in_activation_type(call, kWDown, call.M, arena, round.weight[0]);
  p.w_up = in_activation_type(call, kWUp, call.M_up, arena, round.weight[1]);
  p.tiling = tiling_of(call, forward_rows(call));
  if (call.residual_from == ResidualFrom::kTensor) {
    // Both lie at 16-byte borders. The bytes are counted as numbers: the tensors are two.
    p.residual_shift = (static_cast<int64_t>(reinterpret_cast<uintptr_t>(call.input[kResidual])) -
                        static_cast<int64_t>(reinterpret_cast<uintptr_t>(call.input[kX]))) /
                       static_cast<int64_t>(sizeof(uint16_t));
  }
  if (has_pooled_gate(call)) {
    p.arrivals = arena.take<int>(call.B);
    p.gate_sums = static_cast<int>((p.tiling.group_rows + kGateRows - 1) / kGateRows);
    p.gate_partial = arena.take<float>(2 * static_cast<int64_t>(call.B) * p.gate_sums);
  }
  return p;
}

// Without it the second kernel has nothing to do: a frozen adapter, of which dx was all.
bool wants_parameters(const Call& call) {
  for (int i = 0; i < kInputs; ++i) {
    if (i != kX && call.grad[i] != nullptr) return true;
  }
  return false;
}

// How the sums over rows are cut. All blocks of the second kernel are to be at work at once, one for
// each multiprocessor, whose ring holds enough to keep memory busy; and what a split leaves and the
// last one reads again, 16 R D bytes, has to stay small beside the 4 D of each row that it reads.
int splits_of(const BackwardParams& p) {
  // Without an index for each sample only one member of a bank has rows.
  const bool shares_members = !has_weights_per_sample(p.in);
  const int64_t busy_tiles = weight_tiles_of(p) / (shares_members ? p.members : 1);
  const int64_t rows_of_split = 8 * static_cast<int64_t>(p.in.R);
  const int64_t for_device = multiprocessors() / busy_tiles;
  const int64_t for_rows = (rows_of(p.in) + rows_of_split / 2) / rows_of_split;
  const int64_t tiles = p.weight_tiling.tiles;
  const int64_t splits = std::min(std::min(for_device, for_rows), tiles);
  return static_cast<int>(std::max(splits, int64_t{1}));
}

void round_weights(const RoundParams& round, const Call& call) {
  if (round.weight[0].count + round.weight[1].count > 0) {
    launch_round_sm80(round, call.dtype, call.stream);
  }
}

// The cut of rows and of the weights' gradients into tiles, and the pieces of backward's workspace
// in their places.
BackwardParams backward_params(const Call& call, Arena& arena, RoundParams& round) {
  BackwardParams p;
  p.in = call;
  p.w_down = in_activation_type(call, kWDown, call.M, arena, round.weight[0]);
  p.w_up = in_activation_type(call, kWUp, call.M_up, arena, round.weight[1]);
  const int64_t rows = rows_of(call);
  const int ranks = weight_ranks(call.dtype, call.R);
  p.tiling = tiling_of(call, backward_rows(call));
  p.rank_stride = (call.R + 7) / 8 * 8;
  const int64_t groups = has_weights_per_sample(call) ? call.B : 1;
  p.weight_tiling = cut_rows(groups, rows / groups, kWeightRows);
  p.members = call.M > call.M_up ? call.M : call.M_up;
  p.column_tiles = (call.D + kChunk - 1) / kChunk;
  p.rank_tiles = (call.R + ranks - 1) / ranks;
  p.splits = splits_of(p);
  const bool has_scalars = call.grad[kScale] || call.grad[kGateBias] || call.grad[kGate];
  const bool needs_all = norms_of(call) > 0 || call.grad[kGate];
  p.layer_blocks = needs_all ? norm_members_of(call) * p.column_tiles : has_scalars ? 1 : 0;

  if (has_pooled_gate(call)) {
    p.arrivals = arena.take<int>(call.B);
    p.gate_partial = arena.take<float>(2 * static_cast<int64_t>(p.tiling.tiles));
  }
  p.row_scalars = arena.take<float>(kRowScalars * rows);
  p.tile_sums = arena.take<float>(static_cast<int64_t>(kTileSums) * p.tiling.tiles);
  p.norm_slots = arena.take<int>(1);
  // A block has a tile at least.
  p.norm_partial =
      arena.take<float>(static_cast<int64_t>(p.tiling.tiles) * norms_of(call) * 2 * call.D);
  p.dh = arena.take<uint16_t>(rows * p.rank_stride);
  p.du = arena.take<uint16_t>(has_post_norm(call) ? rows * call.D : 0);
  if (!wants_parameters(call)) return p;
  p.a = arena.take<uint16_t>(rows * p.rank_stride);
  p.factor_parts = arena.take<uint16_t>(rows * kPartsStride);
  p.dlogit_parts = arena.take<uint16_t>(has_learned_gate(call) ? rows * kPartsStride : 0);
  if (p.splits > 1) {
    p.tickets = arena.take<int>(weight_tiles_of(p));
    p.weight_partial = arena.take<float>(weight_tiles_of(p) * p.splits * partial_floats(ranks));
  }
  return p;
}

}  // namespace
}  // namespace pelt::gated_adapter

namespace pelt {

using namespace gated_adapter;

template <>
std::string Cuda<Contract>::why_not(const NativeCall<Contract, int64_t>& call) {
  using Configs = GeneralConfigsOf<Capacity>;
  const bool has_dtype = any_of(
      Configs{}, [&](auto tag) { return fits<typename decltype(tag)::type>(call.dtype, /*R=*/1); });
  if (!has_dtype) {
    return sentence("its matrix products take float16 or bfloat16 activations, and x is ",
                    name_of(call.dtype));
  }
  if (call.D % 8 != 0) {
    return sentence("its rows are read 16 bytes at a time, so D must be a multiple of 8, and D=",
                    call.D, " is not");
  }
  constexpr int kMaxRank = largest_rank(Configs{});
  if (call.R < 1 || call.R > kMaxRank) {
    return sentence("h of a tile is kept in shared memory, so R must be 1 to ", kMaxRank,
                    ", and R=", call.R, " is not");
  }
  // Tiles and columns are counted in 32 bits; elements are in 64.
  constexpr int64_t kMaxRows = int64_t{1} << 30;  // two numbers of each tile have one index
  constexpr int64_t kMaxColumns = int64_t{1} << 24;
  if (rows_of(call) >= kMaxRows || call.D > kMaxColumns) {
    return sentence("its tiles are counted in 32 bits, so B S must be below ", kMaxRows,
                    " and D at most ", kMaxColumns, ", and they are ", rows_of(call), " and ",
                    call.D);
  }
  // Backward's blocks are counted in one dimension; there are splits only while they are few.
  const int64_t members = std::max(call.M, call.M_up);
  const int64_t blocks =
      (members + 1) * ((call.D + kChunk - 1) / kChunk) *
      ((call.R + weight_ranks(call.dtype, call.R) - 1) / weight_ranks(call.dtype, call.R));
  if (blocks >= kMaxRows) {
    return sentence(
        "its blocks are counted in 32 bits, so a bank's tiles of 64 columns must be below ",
        kMaxRows, ", and those of ", members, " members are ", blocks);
  }
  return "";
}

template <>
void Cuda<Contract>::forward(const Call& call, Arena& arena) {
  RoundParams round;
  const ForwardParams p = forward_params(call, arena, round);
  if (arena.only_counts) return;
  round_weights(round, call);
  if (p.arrivals != nullptr) zero_async(p.arrivals, sizeof(int) * call.B, call.stream);
  launch_fwd_sm80(p);
}

template <>
void Cuda<Contract>::backward(const Call& call, Arena& arena) {
  RoundParams round;
  const BackwardParams p = backward_params(call, arena, round);
  if (arena.only_counts) return;
  round_weights(round, call);
  if (p.arrivals != nullptr) zero_async(p.arrivals, sizeof(int) * call.B, call.stream);
  launch_bwd_rows_sm80(p);
  if (wants_parameters(call)) launch_bwd_weights_sm80(p);
}

}  // namespace pelt
