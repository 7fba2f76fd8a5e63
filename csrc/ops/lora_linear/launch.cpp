// Which calls the kernels serve, and the order of their launches. Forward: shrink, expand.
// Backward: the rows' gates again and the gates' gradients where there are any, rows, spread,
// weights.
#include "common/check.h"
#include "ops/lora_linear/params.h"

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

struct BackwardLaunches {
  ShrinkParams shrink;
  RowsParams rows;
  GatesParams gates;
  SpreadParams spread;
  WeightsParams weights;
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
  l.gates.rank_block = rank_block_of(in);
  l.spread.dx = p.dx;
  for (int g = 0; g < in.gates; ++g) {
    l.rows.gate_value[g] = l.weights.gate_value[g] = p.gate_value[g];
    l.gates.dvalue[g] = p.gate[g].dvalue;
  }
  for (int i = 0; i < in.branches; ++i) l.gates.dgate[i] = p.branch[i].dgate;
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
  bool wants_gates = in.gates > 0;
  for (int i = 0; i < in.branches; ++i) wants_gates |= params.branch[i].dgate.data != nullptr;
  if (in.gates > 0) launch_shrink_sm80(l.shrink, stream);
  if (in.branches > 0) launch_rows_sm80(l.rows, stream);
  if (wants_gates) launch_gates_sm80(l.gates, stream);
  if (params.dx != nullptr) launch_spread_sm80(l.spread, stream);
  if (l.weights.tasks == 0) return;
  zero_async(l.weights.tickets, sizeof(int) * l.weights.tasks, stream);
  launch_weights_sm80(l.weights, stream);
}

}  // namespace pelt::lora_linear
