// Which calls the kernels serve, and the order of their launches. A name in brackets is a piece of
// the workspace; what stands beside an arrow goes from one launch to the next, in memory.
//
// Composed, beside the base products of torch's (y = x W^T + b before forward, dx = dy W before
// backward):
//
//   forward    x, A, w  -> shrink -- s, gates --> expand      y += scale g s B^T
//
//   backward   x, w     -> shrink -- [row_gates] ---+                   (with learned gates)
//              dy, s, B -> rows ---- [dots] --------+-> gates           dgate   (with gates)
//                           |                              |
//                          [ds]                        [dlogits]
//                           |                              |
//                           +------------------------------+-> spread   dx += dropout(ds A) + ...
//                           |                              |
//              x, dy, s     +------------------------------+-> weights  dA, dB, dw, db
//
// Single: the launch that multiplies by the base weight does the work of shrink and expand, or of
// rows and of spread's product with ds. Spread is left with the gates' part of dx.
//
//   forward    x, W, A, w, B -> single                        y, s, gates
//
//   backward   x, w          -> shrink -- [row_gates] --+               (with learned gates)
//              dy, W, s, B, A -> single -- [dots] ------+-> gates       dgate   (with gates)
//                                 |                            |
//                                [ds], dx                  [dlogits]
//                                 |                            |
//                                 |                            +-> spread   dx += dlogit w
//                                 |                            |
//              x, dy, s           +----------------------------+-> weights  dA, dB, dw, db
//
// A launch whose results nobody asked for is left out.
#include "common/arena.h"
#include "common/check.h"
#include "ops/lora_linear/params.h"
#include "ops/lora_linear/slots.h"

namespace pelt::lora_linear {

namespace {

bool has_pooled_gates(const Inputs& in) {
  for (int g = 0; g < in.gates; ++g) {
    if (in.gate[g].pooling != Pooling::kToken) return true;
  }
  return false;
}

int64_t row_count(const Inputs& in) { return static_cast<int64_t>(in.B) * in.S; }

// out = from W over rows that are cut as the branches ask. `wide_ranks` are those that a block of
// wide tiles would need.
template <class Params>
Params product_of(const Inputs& in, const void* from, const void* weight, void* to, int depth,
                  int columns, int wide_ranks) {
  Params p;
  p.in = in;
  p.from = from;
  p.weight = weight;
  p.to = to;
  p.depth = depth;
  p.columns = columns;
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

// ---- forward ----

SingleForwardParams single_of(const ForwardParams& p) {
  const Inputs& in = p.in;
  auto single = product_of<SingleForwardParams>(in, in.x, p.weight, p.y, in.Din, in.Dout,
                                                single_forward_ranks(in, kSingleWideColumns));
  single.bias = p.bias;
  single.s = p.s;
  return single;
}

// With the pieces of forward's workspace, which only pooled gates need: the sums of a sentence's
// tiles meet in them.
ShrinkParams shrink_of(const Inputs& in, void* s, Arena& arena) {
  ShrinkParams p;
  p.in = in;
  p.s = s;
  p.tiling = make_tiling(in, kNarrowRows, has_pooled_gates(in));
  if (has_pooled_gates(in)) {
    p.tickets = arena.take<int>(in.B);
    p.gate_partial = arena.take<float>(static_cast<int64_t>(p.tiling.tiles) * (in.gates + 1));
  }
  return p;
}

ExpandParams expand_of(const ForwardParams& p) {
  ExpandParams expand;
  expand.in = p.in;
  expand.s = p.s;
  expand.y = p.y;
  expand.tiling = make_tiling(p.in, kWideRows, false);
  return expand;
}

// ---- backward ----

// The pieces of backward's workspace: what its launches leave for each other.
struct Scratch {
  int* tickets = nullptr;      // [tasks of weights]
  float* partial = nullptr;    // the sums of its splits
  void* ds = nullptr;          // [B * S, ΣR]
  float* dots = nullptr;       // [rank blocks of all branches, B * S]
  float* row_gates = nullptr;  // [gates, B * S]
  float* dlogits = nullptr;    // [gates, B * S]
};

Scratch scratch_of(const WeightsParams& weights, Arena& arena) {
  const Inputs& in = weights.in;
  const int64_t rows = row_count(in);
  int rank_blocks = 0;
  for (int i = 0; i < in.branches; ++i) {
    rank_blocks += (in.branch[i].R + rank_block_of(in) - 1) / rank_block_of(in);
  }
  Scratch scratch;
  scratch.tickets = arena.take<int>(weights.tasks);
  scratch.partial = arena.take<float>(partial_floats_of(weights));
  scratch.ds = arena.take<uint16_t>(rows * in.ranks);
  scratch.dots = arena.take<float>(rows * rank_blocks);
  scratch.row_gates = arena.take<float>(rows * in.gates);
  scratch.dlogits = arena.take<float>(rows * in.gates);
  return scratch;
}

// Without dx there is no product with the base weight that the ranks could be part of.
bool is_single(const BackwardParams& p) { return p.weight != nullptr && p.dx != nullptr; }

bool wants_gates(const BackwardParams& p) {
  bool is_wanted = p.in.gates > 0;
  for (int i = 0; i < p.in.branches; ++i) is_wanted |= p.grads.branch[i].dgate.data != nullptr;
  return is_wanted;
}

// What the last launch sums, and in how many tasks and splits: the workspace depends on it.
WeightsParams plan_weights(const BackwardParams& p) {
  WeightsParams weights;
  weights.in = p.in;
  weights.dy = p.dy;
  weights.s = p.s;
  weights.grads = p.grads;
  weights.tiling = make_tiling(p.in, kWideRows, false);
  plan_sums(weights);
  return weights;
}

ShrinkParams shrink_of(const BackwardParams& p, const Scratch& scratch) {
  ShrinkParams shrink;
  shrink.in = p.in;
  shrink.row_gates = scratch.row_gates;
  shrink.tiling = make_tiling(p.in, kNarrowRows, false);
  return shrink;
}

RowsParams rows_of(const BackwardParams& p, const Scratch& scratch) {
  RowsParams rows;
  rows.in = p.in;
  rows.dy = p.dy;
  rows.s = p.s;
  rows.ds = scratch.ds;
  rows.dots = scratch.dots;
  rows.tiling = make_tiling(p.in, kNarrowRows, false);
  return rows;
}

SingleBackwardParams single_of(const BackwardParams& p, const Scratch& scratch) {
  const Inputs& in = p.in;
  auto single = product_of<SingleBackwardParams>(in, p.dy, p.weight, p.dx, in.Dout, in.Din,
                                                 single_backward_ranks(in));
  single.s = p.s;
  single.ds = scratch.ds;
  if (wants_gates(p)) single.dots = scratch.dots;
  return single;
}

GatesParams gates_of(const BackwardParams& p, const Scratch& scratch) {
  GatesParams gates;
  gates.in = p.in;
  gates.grads = p.grads;
  gates.dots = scratch.dots;
  gates.row_gates = scratch.row_gates;
  gates.dlogits = scratch.dlogits;
  // The single launch adds up all of a branch's dots itself.
  gates.rank_block = is_single(p) ? kSingleRanks : rank_block_of(p.in);
  return gates;
}

SpreadParams spread_of(const BackwardParams& p, const Scratch& scratch) {
  SpreadParams spread;
  spread.in = p.in;
  // The single launch has written the branches' part of dx.
  if (is_single(p)) spread.in.branches = spread.in.ranks = 0;
  spread.ds = scratch.ds;
  spread.dlogits = scratch.dlogits;
  spread.dx = p.dx;
  spread.tiling = make_tiling(p.in, kWideRows, false);
  return spread;
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
  tiling.group_rows = is_per_sentence ? in.S : row_count(in);
  tiling.tiles_per_group = static_cast<int>((tiling.group_rows + tile_rows - 1) / tile_rows);
  tiling.tiles = (is_per_sentence ? in.B : 1) * tiling.tiles_per_group;
  return tiling;
}

int64_t forward_workspace_bytes(const Inputs& in) {
  Arena counting;
  shrink_of(in, nullptr, counting);
  return counting.used;
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  Arena counting;
  scratch_of(plan_weights(params), counting);
  return counting.used;
}

void launch_lora_linear_fwd(const ForwardParams& params, void* workspace, Stream stream) {
  if (params.weight != nullptr) {
    launch_single_fwd_sm80(single_of(params), params.is_transposed, stream);
    return;
  }
  Arena arena{static_cast<char*>(workspace)};
  const ShrinkParams shrink = shrink_of(params.in, params.s, arena);
  if (shrink.tickets != nullptr) zero_async(shrink.tickets, sizeof(int) * params.in.B, stream);
  launch_shrink_sm80(shrink, stream);
  if (params.in.branches > 0) launch_expand_sm80(expand_of(params), stream);
}

void launch_lora_linear_bwd(const BackwardParams& params, void* workspace, Stream stream) {
  const Inputs& in = params.in;
  WeightsParams weights = plan_weights(params);
  Arena arena{static_cast<char*>(workspace)};
  const Scratch scratch = scratch_of(weights, arena);
  if (in.gates > 0) launch_shrink_sm80(shrink_of(params, scratch), stream);
  if (is_single(params)) {
    launch_single_bwd_sm80(single_of(params, scratch), params.is_transposed, stream);
  } else if (in.branches > 0) {
    launch_rows_sm80(rows_of(params, scratch), stream);
  }
  if (wants_gates(params)) launch_gates_sm80(gates_of(params, scratch), stream);
  if (params.dx != nullptr && (!is_single(params) || in.gates > 0)) {
    launch_spread_sm80(spread_of(params, scratch), stream);
  }
  if (weights.tasks == 0) return;  // frozen factors: dx was all
  weights.ds = scratch.ds;
  weights.dlogits = scratch.dlogits;
  weights.partial = scratch.partial;
  weights.tickets = scratch.tickets;
  zero_async(weights.tickets, sizeof(int) * weights.tasks, stream);
  launch_weights_sm80(weights, stream);
}

}  // namespace pelt::lora_linear
