// lora_linear: y[:, columns_i] += scale_i g_i (dropout(x) A_i^T) B_i^T for all branches, and
// learned gates g = pool(sigmoid(w . x + b)). There are two forms: *composed*, over a base product
// that torch's own GEMM leaves in y, and *single*, one launch that computes that too. What the base
// weight's gradients are, where it is not frozen, torch computes in both:
//
//   dweight;  // [Dout, Din]        dbias;  // [Dout]
//
// Plain pointers, sizes and numbers, filled in by bindings/lora_linear.cpp. A null pointer is an
// input that is not there. Shapes are the contract's (pelt_kernels/ops/lora_linear/contract.py), in
// its letters. Backward of the composed form finds dy times the base weight in dx, and adds to it.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/enums.h"
#include "common/launch.h"
#include "common/parameter.h"
#include "cuda/philox.cuh"

namespace pelt::lora_linear {

constexpr int kMaxBranches = 8;
constexpr int kMaxGates = 16;  // learned ones: those of branches and the extra ones

// Rows of a tile: of the kernels that read x or dy for a narrow result, and of those that write
// whole rows or sum over them.
constexpr int kNarrowRows = 32;
constexpr int kWideRows = 64;

struct Branch {
  Parameter a;                       // [R_i, Din] | [M_i, R_i, Din]
  Parameter b;                       // [size_i, R_i] | [N_i, size_i, R_i]
  const int64_t* a_index = nullptr;  // [] | [B]
  const int64_t* b_index = nullptr;  // [] | [B]
  Parameter gate;                    // [B] | [B, S]
  int learned_gate = -1;             // its number in Inputs::gate
  int R = 0;
  int size = 0;
  int offset = 0;
  int first = 0;  // its first column of s
  float scale = 1.0f;
  int a_members = 1;  // M_i, the banks' sizes; 1 also for a single factor
  int b_members = 1;  // N_i
  bool has_a_index_per_sample = false;
  bool has_b_index_per_sample = false;
  bool has_gate_per_row = false;
};

// A branch's gate, or an extra one, whose weight and bias the contract calls
//   extra_weight;  // [Din]        dextra_weight;  // [Din]
//   extra_bias;  // [1]            dextra_bias;  // [1]
struct Gate {
  Parameter gate_weight;   // [Din]
  Parameter gate_bias;     // [1]
  float* value = nullptr;  // [B] | [B, S]: written by forward, read by backward
  Pooling pooling = Pooling::kMean;
  int branch = -1;  // whose gate it is; -1: an extra one
};

struct Inputs {
  DType dtype = DType::kBF16;
  int B = 0;
  int S = 0;
  int Din = 0;
  int Dout = 0;
  int ranks = 0;  // the sum of R_i: columns of s
  int branches = 0;
  int gates = 0;

  const void* x = nullptr;     // [B, S, Din]
  const bool* mask = nullptr;  // [B, S]
  Branch branch[kMaxBranches];
  Gate gate[kMaxGates];
  Dropout dropout;
};

// How rows are cut into tiles. A tile never crosses a group: the sentence, where factors or a
// pooled gate differ from one sentence to the next, otherwise all rows.
struct Tiling {
  int64_t group_rows = 0;
  int tiles_per_group = 0;
  int tiles = 0;
};

struct ForwardParams {
  Inputs in;
  void* y = nullptr;  // [B, S, Dout]: the base product
  void* s = nullptr;  // [B, S, ΣR]

  // Of the single-launch form, which computes the base product too.
  const void* weight = nullptr;  // [Dout, Din] | [Din, Dout]
  Parameter bias;                // [Dout]
  bool is_transposed = false;
};

struct BranchGrads {
  ParameterGrad da;     // [R_i, Din] | [M_i, R_i, Din]
  ParameterGrad db;     // [size_i, R_i] | [N_i, size_i, R_i]
  ParameterGrad dgate;  // [B] | [B, S]
};

struct GateGrads {
  ParameterGrad dgate_weight;     // [Din]
  ParameterGrad dgate_bias;       // [1]
  const float* dvalue = nullptr;  // [B] | [B, S]: of an extra gate, given
};

struct Grads {
  BranchGrads branch[kMaxBranches];
  GateGrads gate[kMaxGates];
};

struct BackwardParams {
  Inputs in;
  const void* dy = nullptr;  // [B, S, Dout]
  const void* s = nullptr;   // [B, S, ΣR]
  void* dx = nullptr;        // [B, S, Din]
  Grads grads;

  // Of the single-launch form, which writes dx without reading it.
  const void* weight = nullptr;  // [Dout, Din] | [Din, Dout]
  bool is_transposed = false;
};

// ---- one launch each: launch.cpp draws which leaves what for which ----

// x times the rows of A and the gates' weights. Forward has it write s and the gates' values,
// backward only row_gates.
struct ShrinkParams {
  Inputs in;
  void* s = nullptr;              // [B, S, ΣR]; null: only gates are wanted
  float* row_gates = nullptr;     // [gates, B * S]: each row's sigmoid(w . x + b)
  float* gate_partial = nullptr;  // [tiles, gates + 1]: sums over rows; the last counts rows
  int* tickets = nullptr;         // [B]
  int gate_column = 0;            // the gates' first column
  Tiling tiling;
};

// y += scale g s B^T.
struct ExpandParams {
  Inputs in;
  const void* s = nullptr;
  void* y = nullptr;
  Tiling tiling;
};

// dy times B: ds = scale g dy B, and each row's <dy B, s>.
struct RowsParams {
  Inputs in;
  const void* dy = nullptr;
  const void* s = nullptr;
  void* ds = nullptr;     // [B, S, ΣR]
  float* dots = nullptr;  // [rank blocks of all branches, B * S]
  Tiling tiling;
};

// The gates' gradients from the rows' dots.
struct GatesParams {
  Inputs in;
  const float* dots = nullptr;
  const float* row_gates = nullptr;  // [gates, B * S]
  Grads grads;
  float* dlogits = nullptr;  // [gates, B * S]
  int rank_block = 16;       // of the launch that left the dots
};

// dx += dropout(ds A) + dlogit w.
struct SpreadParams {
  Inputs in;
  const void* ds = nullptr;
  const float* dlogits = nullptr;
  void* dx = nullptr;
  Tiling tiling;
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
  Inputs in;
  const void* dy = nullptr;
  const void* s = nullptr;
  const void* ds = nullptr;
  const float* dlogits = nullptr;
  Grads grads;
  Sums sums[kMaxSums];
  int count = 0;  // of sums
  int tasks = 0;
  int splits = 1;            // parts of the rows that are summed by different blocks
  float* partial = nullptr;  // [tasks, splits, rank block, 64]
  int* tickets = nullptr;    // [tasks]
  Tiling tiling;
};

// The single-launch form: to = from W + delta, in forward and in backward.
struct SingleParams {
  Inputs in;
  const void* from = nullptr;  // x [B, S, Din] | dy [B, S, Dout]
  const void* weight = nullptr;
  void* to = nullptr;  // y [B, S, Dout] | dx [B, S, Din]
  int depth = 0;       // columns of `from`
  int columns = 0;     // of `to`
  int tile_columns = 0;
  int column_tiles = 0;
  Tiling tiling;
  PhiloxKeys keys;  // of in.dropout
};

struct SingleForwardParams : SingleParams {
  Parameter bias;
  void* s = nullptr;
};

struct SingleBackwardParams : SingleParams {
  const void* s = nullptr;
  void* ds = nullptr;     // [B, S, ΣR]
  float* dots = nullptr;  // [branches, B * S]; null: no gate wants a gradient
};

// Why the kernels refuse a call, with numbers; empty if they serve it.
std::string why_not(DType dtype, int64_t B, int64_t S, int64_t Din, int64_t Dout, int64_t branches,
                    int64_t gates);

// The same for the single-launch form, of what the other serves.
std::string why_not_single(const Inputs& in);

// Bytes of device memory that a direction needs beside its inputs and outputs.
int64_t forward_workspace_bytes(const Inputs& in);
int64_t backward_workspace_bytes(const BackwardParams& params);

void launch_lora_linear_fwd(const ForwardParams& params, void* workspace, Stream stream);
void launch_lora_linear_bwd(const BackwardParams& params, void* workspace, Stream stream);

// The launches; launch.cpp puts them in order.
Tiling make_tiling(const Inputs& in, int tile_rows, bool has_pooled_gates);
int gate_column_of(const Inputs& in);
int rank_block_of(const Inputs& in);
void launch_shrink_sm80(const ShrinkParams& params, Stream stream);
void launch_expand_sm80(const ExpandParams& params, Stream stream);
void launch_rows_sm80(const RowsParams& params, Stream stream);
void launch_gates_sm80(const GatesParams& params, Stream stream);
void launch_spread_sm80(const SpreadParams& params, Stream stream);
void plan_sums(WeightsParams& params);
int64_t partial_floats_of(const WeightsParams& params);
void launch_weights_sm80(const WeightsParams& params, Stream stream);
int single_forward_ranks(const Inputs& in, int tile_columns);
int single_backward_ranks(const Inputs& in);
size_t single_shared_bytes(int ranks, int tile_columns);
void launch_single_fwd_sm80(const SingleForwardParams& params, bool is_transposed, Stream stream);
void launch_single_bwd_sm80(const SingleBackwardParams& params, bool is_transposed, Stream stream);

}  // namespace pelt::lora_linear
