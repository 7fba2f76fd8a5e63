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

int single_forward_ranks(const Linear& in, int tile_columns) {
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

int single_backward_ranks(const Linear& in) {
  return for_each_slot(in, 0, in.Dout, [](int, int, int) {}).slots * kSlot;
}

namespace {

bool has_pooled_gates(const Linear& in) {
  for (int g = 0; g < in.gates; ++g) {
    if (in.gate[g].pooling != Pooling::kToken) return true;
  }
  return false;
}

int64_t row_count(const Linear& in) { return static_cast<int64_t>(in.B) * in.S; }

Tiling make_tiling(const Linear& in, int tile_rows, bool is_per_sentence = false) {
  for (int i = 0; i < in.branches; ++i) {
    is_per_sentence |= in.branch[i].has_a_index_per_sample || in.branch[i].has_b_index_per_sample;
  }
  return is_per_sentence ? rows::cut_rows(in.B, in.S, tile_rows)
                         : rows::cut_rows(1, row_count(in), tile_rows);
}

// ---- which calls are served ----

std::string why_not_composed(const NativeCall<Contract, int64_t>& call) {
  if (call.dtype == DType::kF32) {
    return "its matrix products take float16 or bfloat16 activations, and x is float32";
  }
  if (call.Din % 8 != 0 || call.Dout % 8 != 0) {
    return sentence(
        "its rows are read 16 bytes at a time, so Din and Dout must be multiples of 8,"
        " and they are ",
        call.Din, " and ", call.Dout);
  }
  const int branches = call.R_i.count, gates = gate_count(call);
  if (branches > kMaxBranches || gates > kMaxGates) {
    return sentence("it takes at most ", kMaxBranches, " branches and ", kMaxGates,
                    " learned gates, and there are ", branches, " and ", gates);
  }
  // Tiles and columns are counted in 32 bits and columns' tiles in 16; elements are in 64.
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  constexpr int64_t kMaxColumns = int64_t{1} << 21;
  if (call.B * call.S >= kMaxRows || call.Din > kMaxColumns || call.Dout > kMaxColumns) {
    return sentence("its tiles are counted in 32 bits, so B S must be below ", kMaxRows,
                    " and Din and Dout at most ", kMaxColumns, ", and they are ", call.B * call.S,
                    ", ", call.Din, " and ", call.Dout);
  }
  return "";
}

// Of a call that the composed form serves.
std::string why_not_single(const Linear& in) {
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
    // Backward multiplies 16 columns of dy at a time. A NaN beside a branch's own columns must not
    // be among them.
    const int begin = in.branch[i].offset, end = begin + in.branch[i].size;
    if (begin % 16 != 0 || (end % 16 != 0 && end != in.Dout)) {
      return sentence("it multiplies 16 columns of y at a time, so a branch begins and ends at a",
                      " multiple of 16 or at Dout, and one has the columns from ", begin, " to ",
                      end, " of ", in.Dout);
    }
  }
  constexpr int64_t kMaxTiles = int64_t{1} << 31;
  const int widest = in.Din > in.Dout ? in.Din : in.Dout;
  const int64_t tiles = static_cast<int64_t>(make_tiling(in, single_rows(kSingleColumns)).tiles) *
                        ((widest + kSingleColumns - 1) / kSingleColumns);
  if (tiles >= kMaxTiles) {
    return sentence("its tiles are counted in 32 bits, and there are ", tiles);
  }
  return "";
}

// ---- the single launch ----

// Each tile of y draws the dropout of its rows of x for itself, which issues about as many
// instructions as the products of this many columns.
constexpr int kColumnsOfDraws = 512;

// The columns of a block's tile. A tile costs its products, of W and of P, and its draws; the launch
// lasts as long as the multiprocessor with the most tiles works. Wide tiles spend the least on P and
// on draws, small ones leave no multiprocessor without work where rows and columns are few.
// `ranks_of(columns)` are those that a block needs.
template <class RanksOf>
int choose_columns(const Linear& in, int columns, bool draws, RanksOf&& ranks_of) {
  int best = kSingleColumns;
  double least = 0.0;
  // In this order: of equal ones the first is taken.
  for (int tile : {kSingleColumns, kSingleWideColumns, kSingleSmallColumns}) {
    const bool is_usual = tile == kSingleColumns;
    if (!is_usual && ranks_of(tile) > kSlot) continue;
    if (!is_usual && single_shared_bytes(kSlot, tile) > max_shared_bytes()) continue;
    const int64_t tiles = static_cast<int64_t>(make_tiling(in, single_rows(tile)).tiles) *
                          ((columns + tile - 1) / tile);
    const int64_t most = (tiles + multiprocessors() - 1) / multiprocessors();
    // A small tile's warps load twice as many fragments for a product, as shared memory's rate tells.
    const double of_loads = tile == kSingleSmallColumns ? 1.3 : 1.0;
    const int ranks = ranks_of(tile) <= kSlot ? kSlot : kSingleRanks;
    const int width = tile + ranks + (draws ? kColumnsOfDraws : 0);
    const double cost = of_loads * most * single_rows(tile) * width;
    if (is_usual || cost < least) best = tile, least = cost;
  }
  return best;
}

// to = from W over rows that are cut as the branches ask.
template <class Params, class RanksOf>
Params product_of(const Linear& in, const void* from, int depth, const void* weight, void* to,
                  int columns, bool draws, RanksOf&& ranks_of) {
  Params p;
  p.in = in;
  p.from = from, p.depth = depth;
  p.weight = weight;
  p.to = to, p.columns = columns;
  p.tile_columns = choose_columns(in, columns, draws, ranks_of);
  p.column_tiles = (columns + p.tile_columns - 1) / p.tile_columns;
  p.tiling = make_tiling(in, single_rows(p.tile_columns));
  p.keys = PhiloxKeys::of(in.dropout.seed);
  return p;
}

SingleForwardParams single_forward(const Linear& in, const Call& call) {
  auto single = product_of<SingleForwardParams>(
      in, in.x, in.Din, call.input[kWeight], in.y, in.Dout, in.dropout.is_active(),
      [&](int tile_columns) { return single_forward_ranks(in, tile_columns); });
  single.bias = call.parameter(kBias);
  return single;
}

// Without dx there is no product with the base weight that the ranks could be part of.
bool is_single_backward(const Call& call) { return call.form == kSingle && call.grad[kX]; }

SingleBackwardParams single_backward(const Linear& in, const Call& call) {
  return product_of<SingleBackwardParams>(in, in.dy, in.Dout, call.input[kWeight], in.dx, in.Din,
                                          /*draws=*/false,
                                          [&](int) { return single_backward_ranks(in); });
}

// ---- the launches of the composed form, with their pieces of the workspace ----

// Only pooled gates need any: the sums of a sentence's tiles meet in it.
ShrinkParams shrink_forward(const Linear& in, Arena& arena) {
  const bool is_pooled = has_pooled_gates(in);
  ShrinkParams p{in, make_tiling(in, kNarrowRows, is_pooled)};
  if (is_pooled) {
    p.tickets = arena.take<int>(in.B);
    p.gate_partial = arena.take<float>(static_cast<int64_t>(p.tiling.tiles) * (in.gates + 1));
  }
  return p;
}

// What backward's launches leave for each other.
struct Scratch {
  void* ds = nullptr;          // [B * S, ΣR]
  float* dots = nullptr;       // [rank blocks of all branches, B * S]
  float* row_gates = nullptr;  // [gates, B * S]
  float* dlogits = nullptr;    // [gates, B * S]
};

Scratch scratch_of(const Linear& in, Arena& arena) {
  const int64_t rows = row_count(in);
  const int block = rank_block_of(in);
  int rank_blocks = 0;
  for (int i = 0; i < in.branches; ++i) rank_blocks += (in.branch[i].R + block - 1) / block;
  Scratch scratch;
  scratch.ds = arena.take<uint16_t>(rows * in.ranks);
  scratch.dots = arena.take<float>(rows * rank_blocks);
  scratch.row_gates = arena.take<float>(rows * in.gates);
  scratch.dlogits = arena.take<float>(rows * in.gates);
  return scratch;
}

// The last launch, and memory for the sums of its splits.
WeightsParams weights_of(const Linear& in, const Scratch& scratch, Arena& arena) {
  WeightsParams p{in, make_tiling(in, kWideRows), scratch.ds, scratch.dlogits};
  plan_sums(p);
  p.tickets = arena.take<int>(p.tasks);
  p.partial = arena.take<float>(partial_floats_of(p));
  return p;
}

bool wants_gates(const Linear& in) {
  bool is_wanted = in.gates > 0;
  for (int i = 0; i < in.branches; ++i) is_wanted |= in.branch[i].dgate.data != nullptr;
  return is_wanted;
}

}  // namespace
}  // namespace pelt::lora_linear

namespace pelt {

using namespace lora_linear;

template <>
std::string Cuda<Contract>::why_not(const NativeCall<Contract, int64_t>& call) {
  std::string reason = why_not_composed(call);
  if (reason.empty() && call.form == kSingle) reason = why_not_single(Linear::of(Call(call)));
  return reason;
}

template <>
void Cuda<Contract>::forward(const Call& call, Arena& arena) {
  const Linear in = Linear::of(call);
  const ShrinkParams shrink = shrink_forward(in, arena);
  if (arena.only_counts) return;
  if (call.form == kSingle) {
    launch_single_fwd_sm80(single_forward(in, call), call.transposed, call.stream);
    return;
  }
  if (in.branches + in.gates == 0) return;  // y is the base product
  if (shrink.tickets != nullptr) zero_async(shrink.tickets, sizeof(int) * in.B, call.stream);
  launch_shrink_sm80(shrink, call.stream);
  if (in.branches > 0) launch_expand_sm80({in, make_tiling(in, kWideRows)}, call.stream);
}

template <>
void Cuda<Contract>::backward(const Call& call, Arena& arena) {
  const Linear in = Linear::of(call);
  const Scratch scratch = scratch_of(in, arena);
  const WeightsParams weights = weights_of(in, scratch, arena);
  if (arena.only_counts) return;
  const bool is_single = is_single_backward(call);
  if (in.branches + in.gates == 0 && !is_single) return;  // dx is the base product
  const Tiling narrow = make_tiling(in, kNarrowRows), wide = make_tiling(in, kWideRows);

  if (in.gates > 0) {
    ShrinkParams shrink{in, narrow};
    shrink.row_gates = scratch.row_gates;
    launch_shrink_sm80(shrink, call.stream);
  }
  if (is_single) {
    SingleBackwardParams single = single_backward(in, call);
    single.ds = scratch.ds;
    if (wants_gates(in)) single.dots = scratch.dots;
    launch_single_bwd_sm80(single, call.transposed, call.stream);
  } else if (in.branches > 0) {
    launch_rows_sm80({in, narrow, scratch.ds, scratch.dots}, call.stream);
  }
  if (wants_gates(in)) {
    // The single launch adds up all of a branch's dots itself.
    const int rank_block = is_single ? kSingleRanks : rank_block_of(in);
    launch_gates_sm80({in, scratch.dots, scratch.row_gates, scratch.dlogits, rank_block},
                      call.stream);
  }
  if (in.dx != nullptr && (!is_single || in.gates > 0)) {
    SpreadParams spread{in, wide, scratch.ds, scratch.dlogits, PhiloxKeys::of(in.dropout.seed)};
    // The single launch has written the branches' part of dx.
    if (is_single) spread.in.branches = spread.in.ranks = 0;
    launch_spread_sm80(spread, call.stream);
  }
  if (weights.tasks == 0) return;  // frozen factors: dx was all
  zero_async(weights.tickets, sizeof(int) * weights.tasks, call.stream);
  launch_weights_sm80(weights, call.stream);
}

}  // namespace pelt
