// lora_linear's CUDA kernels: y[:, columns_i] += scale_i g_i (dropout(x) A_i^T) B_i^T for all
// branches, and learned gates g = pool(sigmoid(w . x + b)).
//
// There are two forms: *composed*, over a base product that torch's own GEMM leaves in y, or in dx
// for backward, and *single*, one launch that computes that too. What the base weight's gradients
// are, where it is not frozen, torch computes in both.
#pragma once

#include "common/launch.h"
#include "common/tiling.h"
#include "ops/lora_linear/linear.h"

namespace pelt::lora_linear {

enum Form : int { kComposed, kSingle };  // in the order of FORMS in native.py

constexpr int kMaxBranches = 8;
constexpr int kMaxGates = 16;  // learned ones

struct OnGpu {};
using Call = NativeCall<Contract, int>;
using Linear = BasicLinear<int, kMaxBranches, kMaxGates, OnGpu>;
using Branch = Linear::Branch;
using Gate = Linear::Gate;
using rows::Tiling;

// Rows of a tile: of the kernels that read x or dy for a narrow result, and of those that write
// whole rows or sum over them.
constexpr int kNarrowRows = 32;
constexpr int kWideRows = 64;

// ---- one launch each: launch.cpp draws which leaves what for which ----

// x times the rows of A and the gates' weights. Forward has it write s and the gates' values,
// backward only the rows' gates.
struct ShrinkParams {
  Linear in;
  Tiling tiling;
  int gate_column = 0;            // the gates' first column
  float* row_gates = nullptr;     // [gates, B * S]: backward's, each row's sigmoid(w . x + b)
  float* gate_partial = nullptr;  // [tiles, gates + 1]: sums over rows; the last counts rows
  int* tickets = nullptr;         // [B]

  PELT_HOST_DEVICE bool is_for_backward() const { return row_gates != nullptr; }
};

// y += scale g s B^T.
struct ExpandParams {
  Linear in;
  Tiling tiling;
};

// dy times B: ds = scale g dy B, and each row's <dy B, s>.
struct RowsParams {
  Linear in;
  Tiling tiling;
  void* ds = nullptr;     // [B, S, ΣR]
  float* dots = nullptr;  // [rank blocks of all branches, B * S]
};

// The gates' gradients from the rows' dots.
struct GatesParams {
  Linear in;
  const float* dots = nullptr;
  const float* row_gates = nullptr;  // [gates, B * S]
  float* dlogits = nullptr;          // [gates, B * S]
  int rank_block = 16;               // of the launch that left the dots
};

// dx += dropout(ds A) + dlogit w.
struct SpreadParams {
  Linear in;
  Tiling tiling;
  const void* ds = nullptr;
  const float* dlogits = nullptr;
  PhiloxKeys keys;  // of in.dropout
};

// A sum over rows of one matrix times another: dA of a branch, dB, or dw of some gates.
struct Sums {
  enum Kind : int { kDownFactor, kUpFactor, kGateWeights };
  Kind kind = kDownFactor;
  int which = 0;         // the branch, or the first gate
  int column_tiles = 0;  // 64 columns each
  int rank_tiles = 0;
  int first_task = 0;  // tasks are rank tiles by column tiles by members
};

constexpr int kMaxSums = 2 * kMaxBranches + kMaxGates;

struct WeightsParams {
  Linear in;
  Tiling tiling;
  const void* ds = nullptr;
  const float* dlogits = nullptr;
  Sums sums[kMaxSums] = {};
  int count = 0;  // of sums
  int tasks = 0;
  int splits = 1;            // parts of the rows that are summed by different blocks
  float* partial = nullptr;  // [tasks, splits, rank block, 64]
  int* tickets = nullptr;    // [tasks]
};

// The single-launch form: to = from W + delta, in forward and in backward.
struct SingleParams {
  Linear in;
  Tiling tiling;
  const void* from = nullptr;    // x [B, S, Din] | dy [B, S, Dout]
  const void* weight = nullptr;  // [Dout, Din] | [Din, Dout]
  void* to = nullptr;            // y [B, S, Dout] | dx [B, S, Din]
  int depth = 0;                 // columns of `from`
  int columns = 0;               // of `to`
  int tile_columns = 0;
  int column_tiles = 0;
  PhiloxKeys keys;  // of in.dropout
};

struct SingleForwardParams : SingleParams {
  Parameter bias;  // [Dout]
};

struct SingleBackwardParams : SingleParams {
  void* ds = nullptr;     // [B, S, ΣR]
  float* dots = nullptr;  // [branches, B * S]; null: no gate wants a gradient
};

// What launch.cpp has to know of tiles and of what a launch sums.
int gate_column_of(const Linear& in);
int rank_block_of(const Linear& in);
void plan_sums(WeightsParams& params);
int64_t partial_floats_of(const WeightsParams& params);
int single_forward_ranks(const Linear& in, int tile_columns);
int single_backward_ranks(const Linear& in);
size_t single_shared_bytes(int ranks, int tile_columns);

void launch_shrink_sm80(const ShrinkParams& params, Stream stream);
void launch_expand_sm80(const ExpandParams& params, Stream stream);
void launch_rows_sm80(const RowsParams& params, Stream stream);
void launch_gates_sm80(const GatesParams& params, Stream stream);
void launch_spread_sm80(const SpreadParams& params, Stream stream);
void launch_weights_sm80(const WeightsParams& params, Stream stream);
void launch_single_fwd_sm80(const SingleForwardParams& params, bool is_transposed, Stream stream);
void launch_single_bwd_sm80(const SingleBackwardParams& params, bool is_transposed, Stream stream);

}  // namespace pelt::lora_linear
