// What the host does around the kernels: it says which calls they serve, cuts rows into tiles, lays
// out the workspace and puts the launches in order.
//
//   forward    fwd            x -> h, gate_value, y
//   backward   bwd_rows       x, dy, h -> dx, and in the workspace dh, du, each row's scalars
//              bwd_weights    x, dy, h and those -> the gradients of parameters
//
// There is one family of kernels, for sm_80 and everything after it.
#include "common/arena.h"
#include "common/check.h"
#include "ops/gated_adapter/configs.h"

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

Tiling tiling_of(const Call& in) {
  const int64_t groups = has_pooled_gate(in) || has_weights_per_sample(in) ? in.B : 1;
  return cut_rows(groups, rows_of(in) / groups, kBlockT);
}

// The cut into tiles, and the pieces of forward's workspace in their places.
ForwardParams forward_params(const Call& call, Arena& arena) {
  ForwardParams p;
  p.in = call;
  p.tiling = tiling_of(call);
  if (has_pooled_gate(call)) {
    p.arrivals = arena.take<int>(call.B);
    p.gate_partial = arena.take<float>(2 * static_cast<int64_t>(p.tiling.tiles));
  }
  return p;
}

int64_t weight_tiles_of(const BackwardParams& p) {
  return static_cast<int64_t>(p.members) * p.column_tiles * p.rank_tiles;
}

// Counters that start from zero: a pooled gate's arrivals, and the tickets behind them.
int64_t counters_of(const BackwardParams& p) { return p.in.B + weight_tiles_of(p); }

// The cut of rows and of the weights' gradients into tiles, and the pieces of backward's workspace
// in their places.
BackwardParams backward_params(const Call& call, Arena& arena) {
  BackwardParams p;
  p.in = call;
  const int64_t rows = rows_of(call);
  const int ranks = weight_ranks(call.R);
  p.tiling = tiling_of(call);
  p.members = call.M > call.M_up ? call.M : call.M_up;
  p.column_tiles = (call.D + kChunk - 1) / kChunk;
  p.rank_tiles = (call.R + ranks - 1) / ranks;
  // Two blocks for each multiprocessor: more splits would mean more partial sums to write and to
  // add.
  const int wanted = 2 * multiprocessors() / (p.column_tiles * p.rank_tiles * p.members);
  p.splits = wanted < 1 ? 1 : wanted > p.tiling.tiles ? p.tiling.tiles : wanted;

  p.arrivals = arena.take<int>(counters_of(p));
  p.tickets = p.arrivals + call.B;
  p.gate_partial = arena.take<float>(2 * static_cast<int64_t>(p.tiling.tiles));
  p.row_scalars = arena.take<float>(kRowScalars * rows);
  p.norm_partial = arena.take<float>(static_cast<int64_t>(p.tiling.tiles) * kWarps *
                                     norms_of(call) * 2 * call.D);
  p.weight_partial = arena.take<float>(weight_tiles_of(p) * p.splits * partial_floats(ranks));
  p.dh = arena.take<uint16_t>(rows * call.R);
  p.du = arena.take<uint16_t>(has_post_norm(call) ? rows * call.D : 0);
  return p;
}

// Without it the second kernel has nothing to do: a frozen adapter, of which dx was all.
bool wants_parameters(const Call& call) {
  for (int i = 0; i < kInputs; ++i) {
    if (i != kX && call.grad[i] != nullptr) return true;
  }
  return false;
}

}  // namespace
}  // namespace pelt::gated_adapter

namespace pelt {

using namespace gated_adapter;

template <>
std::string Cuda<Contract>::why_not(const NativeCall<Contract, int64_t>& call) {
  using Configs = ConfigsOf<Capacity>;
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
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  constexpr int64_t kMaxColumns = int64_t{1} << 24;
  if (rows_of(call) >= kMaxRows || call.D > kMaxColumns) {
    return sentence("its tiles are counted in 32 bits, so B S must be below ", kMaxRows,
                    " and D at most ", kMaxColumns, ", and they are ", rows_of(call), " and ",
                    call.D);
  }
  return "";
}

template <>
void Cuda<Contract>::forward(const Call& call, Arena& arena) {
  const ForwardParams p = forward_params(call, arena);
  if (arena.only_counts) return;
  if (p.arrivals != nullptr) zero_async(p.arrivals, sizeof(int) * call.B, call.stream);
  launch_fwd_sm80(p);
}

template <>
void Cuda<Contract>::backward(const Call& call, Arena& arena) {
  const BackwardParams p = backward_params(call, arena);
  if (arena.only_counts) return;
  zero_async(p.arrivals, sizeof(int) * static_cast<size_t>(counters_of(p)), call.stream);
  launch_bwd_rows_sm80(p);
  if (wants_parameters(call)) launch_bwd_weights_sm80(p);
}

}  // namespace pelt
