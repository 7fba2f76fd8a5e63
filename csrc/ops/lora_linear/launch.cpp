// Which calls the kernels serve, and the order of their launches.
//
// Composed. Forward: shrink, expand. Backward: the rows' gates again and the gates' gradients where
// there are any, rows, spread, weights.
//
// Single. Forward: one. Backward: one for dx and ds, and the weights; with gates their launches
// stand between.
#include "common/check.h"
#include "ops/lora_linear/params.h"
#include "ops/lora_linear/slots.h"

namespace pelt::lora_linear {

namespace {

constexpr int kNarrowRows = 32, kWideRows = 64;

bool has_pooled_gates(const Inputs& in) {
  for (int g = 0; g < in.gates; ++g) {
    if (in.gate[g].pooling != Pooling::kToken) return true;
  }
  return false;
}

int64_t rows_of(const Inputs& in) { return static_cast<int64_t>(in.B) * in.S; }

// Hands out pieces of the workspace; without memory it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
};

// The pieces of forward's workspace, in their places.
int64_t place(ShrinkParams& p, Arena arena) {
  p.tiling = make_tiling(p.in, kNarrowRows, has_pooled_gates(p.in));
  if (has_pooled_gates(p.in)) {
    p.tickets = arena.take<int>(p.in.B);
    p.gate_partial = arena.take<float>(static_cast<int64_t>(p.tiling.tiles) * (p.in.gates + 1));
  }
  return arena.used;
}

// Without dx there is no product that the ranks could ride on.
bool is_single(const BackwardParams& p) { return p.weight != nullptr && p.dx != nullptr; }

bool wants_gates(const BackwardParams& p) {
  bool wanted = p.in.gates > 0;
  for (int i = 0; i < p.in.branches; ++i) wanted |= p.branch[i].dgate.data != nullptr;
  return wanted;
}

// out = from W over rows that are cut as the branches ask. `wide_ranks` are those that a block of
// wide tiles would need.
template <class Params>
Params single_of(const Inputs& in, const void* from, const void* weight, void* to, int depth,
                 int columns, int wide_ranks) {
  Params p;
  p.in = in, p.from = from, p.weight = weight, p.to = to, p.depth = depth, p.columns = columns;
  p.tiling = make_tiling(in, kSingleRows, false);
  // A warp of a wide tile reads half as much shared memory for each product; but two rounds of
  // tiles are needed for it to keep every multiprocessor busy.
  const int wide_tiles = (columns + kSingleWideColumns - 1) / kSingleWideColumns;
  const bool is_wide = static_cast<int64_t>(p.tiling.tiles) * wide_tiles >= 2 * multiprocessors() &&
                       wide_ranks <= kSlot &&
                       single_shared_bytes(kSlot, kSingleWideColumns) <= max_shared_bytes();
  p.tile_columns = is_wide ? kSingleWideColumns : kSingleColumns;
  p.column_tiles = is_wide ? wide_tiles : (columns + kSingleColumns - 1) / kSingleColumns;
  p.keys = PhiloxKeys::of(in.dropout.seed);
  return p;
}

struct BackwardLaunches {
  ShrinkParams shrink;
  RowsParams rows;
  GatesParams gates;
  SpreadParams spread;
  WeightsParams weights;
  SingleBackwardParams single;
};

int64_t place(BackwardLaunches& l, const BackwardParams& p, Arena arena) {
  const Inputs& in = p.in;
  const int64_t rows = rows_of(in);
  int parts = 0;
  for (int i = 0; i < in.branches; ++i) {
    parts += (in.branch[i].R + rank_block_of(in) - 1) / rank_block_of(in);
  }
  l.shrink.in = l.rows.in = l.gates.in = l.spread.in = l.weights.in = in;
  l.weights.tiling = make_tiling(in, kWideRows, false);
  for (int i = 0; i < in.branches; ++i) l.weights.branch[i] = p.branch[i];
  for (int g = 0; g < in.gates; ++g) l.weights.gate[g] = p.gate[g];
  plan_sums(l.weights);
  l.weights.tickets = arena.take<int>(l.weights.tasks);
  l.weights.partial = arena.take<float>(partial_floats_of(l.weights));
  l.weights.dy = l.rows.dy = p.dy;
  l.weights.s = l.rows.s = p.s;
  l.rows.ds = arena.take<uint16_t>(rows * in.ranks);
  l.rows.dots = arena.take<float>(rows * parts);
  l.shrink.row_gates = arena.take<float>(rows * in.gates);
  l.gates.dlogits = arena.take<float>(rows * in.gates);
  l.rows.tiling = l.shrink.tiling = make_tiling(in, kNarrowRows, false);
  l.spread.tiling = make_tiling(in, kWideRows, false);
  l.weights.ds = l.spread.ds = l.rows.ds;
  l.weights.dlogits = l.spread.dlogits = l.gates.dlogits;
  l.gates.row_gates = l.shrink.row_gates;
  l.gates.dots = l.rows.dots;
  // The single launch adds up a branch's dots.
  l.gates.rank_block = is_single(p) ? kSingleRanks : rank_block_of(in);
  l.spread.dx = p.dx;
  for (int g = 0; g < in.gates; ++g) {
    l.rows.gate_value[g] = l.weights.gate_value[g] = p.gate_value[g];
    l.gates.dvalue[g] = p.gate[g].dvalue;
  }
  for (int i = 0; i < in.branches; ++i) l.gates.dgate[i] = p.branch[i].dgate;
  if (is_single(p)) {
    l.single = single_of<SingleBackwardParams>(in, p.dy, p.weight, p.dx, in.Dout, in.Din,
                                               single_backward_ranks(in));
    l.single.s = p.s, l.single.ds = l.rows.ds;
    if (wants_gates(p)) l.single.dots = l.rows.dots;
    for (int g = 0; g < in.gates; ++g) l.single.gate_value[g] = p.gate_value[g];
    // What is left to add to dx is the gates'.
    l.spread.in.branches = l.spread.in.ranks = 0;
  }
  return arena.used;
}

}  // namespace

std::string why_not(DType dtype, int64_t B, int64_t S, int64_t Din, int64_t Dout, int64_t branches,
                    int64_t gates) {
  if (dtype == DType::kF32) {
    return "its matrix products take float16 or bfloat16 activations, and x is float32";
  }
  if (Din % 8 != 0 || Dout % 8 != 0) {
    return sentence(
        "its rows are read 16 bytes at a time, so Din and Dout must be multiples of 8,"
        " and they are ",
        Din, " and ", Dout);
  }
  if (branches > kMaxBranches || gates > kMaxGates) {
    return sentence("it takes at most ", kMaxBranches, " branches and ", kMaxGates,
                    " learned gates, and there are ", branches, " and ", gates);
  }
  // Tiles and columns are counted in 32 bits and columns' tiles in 16; elements are in 64.
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  constexpr int64_t kMaxColumns = int64_t{1} << 21;
  if (B * S >= kMaxRows || Din > kMaxColumns || Dout > kMaxColumns) {
    return sentence("its tiles are counted in 32 bits, so B S must be below ", kMaxRows,
                    " and Din and Dout at most ", kMaxColumns, ", and they are ", B * S, ", ", Din,
                    " and ", Dout);
  }
  return "";
}

int single_forward_ranks(const Inputs& in, int tile_columns) {
  int most = 0;
  for (int first = 0; first < in.Dout; first += tile_columns) {
    const int end = first + tile_columns;
    const RankColumns columns = for_each_slot(in, first, end, [](int, int, int) {});
    const int gates = needs_gates(in, first, end) ? in.gates : 0;
    const int filled = columns.slots * kSlot, with_gates = columns.gate_column + gates;
    if (filled > most) most = filled;
    if (with_gates > most) most = with_gates;
  }
  return most;
}

int single_backward_ranks(const Inputs& in) {
  return for_each_slot(in, 0, in.Dout, [](int, int, int) {}).slots * kSlot;
}

std::string why_not_single(const Inputs& in) {
  if (has_pooled_gates(in)) {
    return "a pooled gate is known when its whole sentence was read, and one launch scales rows"
           " before that";
  }
  const int forward = single_forward_ranks(in, kSingleColumns);
  const int backward = single_backward_ranks(in);
  const int ranks = forward > backward ? forward : backward;
  if (ranks > kSingleRanks) {
    return sentence("a block has room for ", kSingleRanks,
                    " ranks of all branches, each rounded up"
                    " to a multiple of ",
                    kSlot, ", and learned gates, and needs ", ranks);
  }
  for (int i = 0; i < in.branches; ++i) {
    // Backward multiplies 16 columns of dy at a time, and a NaN beside a branch's own is not its.
    const int begin = in.branch[i].offset, end = begin + in.branch[i].size;
    if (begin % 16 != 0 || (end % 16 != 0 && end != in.Dout)) {
      return sentence("it multiplies 16 columns of y at a time, so a branch begins and ends at a",
                      " multiple of 16 or at Dout, and one has the columns from ", begin, " to ",
                      end, " of ", in.Dout);
    }
  }
  const size_t bytes = single_shared_bytes(ranks, kSingleColumns), most = max_shared_bytes();
  if (bytes > most) {
    return sentence("a block needs ", bytes, " bytes of shared memory, and this GPU has ", most);
  }
  constexpr int64_t kMaxTiles = int64_t{1} << 31;
  const int widest = in.Din > in.Dout ? in.Din : in.Dout;
  const int64_t tiles = static_cast<int64_t>(make_tiling(in, kSingleRows, false).tiles) *
                        ((widest + kSingleColumns - 1) / kSingleColumns);
  if (tiles >= kMaxTiles) {
    return sentence("its tiles are counted in 32 bits, and there are ", tiles);
  }
  return "";
}

Tiling make_tiling(const Inputs& in, int tile_rows, bool has_pooled_gates) {
  bool is_per_sentence = has_pooled_gates;
  for (int i = 0; i < in.branches; ++i) {
    is_per_sentence |= in.branch[i].has_a_index_per_sample || in.branch[i].has_b_index_per_sample;
  }
  Tiling tiling;
  tiling.group_rows = is_per_sentence ? in.S : rows_of(in);
  tiling.tiles_per_group = static_cast<int>((tiling.group_rows + tile_rows - 1) / tile_rows);
  tiling.tiles = (is_per_sentence ? in.B : 1) * tiling.tiles_per_group;
  return tiling;
}

int64_t forward_workspace_bytes(const Inputs& in) {
  ShrinkParams p;
  p.in = in;
  return place(p, Arena{});
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  BackwardLaunches launches;
  return place(launches, params, Arena{});
}

void launch_lora_linear_fwd(const ForwardParams& params, void* workspace, Stream stream) {
  if (params.weight != nullptr) {
    const Inputs& in = params.in;
    auto single = single_of<SingleForwardParams>(in, in.x, params.weight, params.y, in.Din, in.Dout,
                                                 single_forward_ranks(in, kSingleWideColumns));
    single.bias = params.bias, single.s = params.s;
    for (int g = 0; g < in.gates; ++g) single.gate_value[g] = params.gate_value[g];
    launch_single_fwd_sm80(single, params.is_transposed, stream);
    return;
  }
  ShrinkParams shrink;
  shrink.in = params.in;
  shrink.s = params.s;
  for (int g = 0; g < params.in.gates; ++g) shrink.gate_value[g] = params.gate_value[g];
  place(shrink, Arena{static_cast<char*>(workspace)});
  if (shrink.tickets != nullptr) zero_async(shrink.tickets, sizeof(int) * params.in.B, stream);
  launch_shrink_sm80(shrink, stream);
  if (params.in.branches == 0) return;
  ExpandParams expand;
  expand.in = params.in;
  expand.s = params.s;
  expand.y = params.y;
  for (int g = 0; g < params.in.gates; ++g) expand.gate_value[g] = params.gate_value[g];
  expand.tiling = make_tiling(params.in, kWideRows, false);
  launch_expand_sm80(expand, stream);
}

void launch_lora_linear_bwd(const BackwardParams& params, void* workspace, Stream stream) {
  const Inputs& in = params.in;
  BackwardLaunches l;
  place(l, params, Arena{static_cast<char*>(workspace)});
  if (in.gates > 0) launch_shrink_sm80(l.shrink, stream);
  if (is_single(params)) {
    launch_single_bwd_sm80(l.single, params.is_transposed, stream);
  } else if (in.branches > 0) {
    launch_rows_sm80(l.rows, stream);
  }
  if (wants_gates(params)) launch_gates_sm80(l.gates, stream);
  if (params.dx != nullptr && (!is_single(params) || in.gates > 0)) {
    launch_spread_sm80(l.spread, stream);
  }
  if (l.weights.tasks == 0) return;
  zero_async(l.weights.tickets, sizeof(int) * l.weights.tasks, stream);
  launch_weights_sm80(l.weights, stream);
}

}  // namespace pelt::lora_linear
