// gated_adapter:
//   h = W_down pre_norm(x) + b_down
//   y = residual + scale g dropout(post_norm(W_up phi(h) + b_up))
//
// Plain pointers, sizes and numbers, filled in by csrc/bindings. A null pointer is an input that is
// not there. Shapes are the contract's (pelt_kernels/ops/gated_adapter/contract.py), in its
// letters.
#pragma once

#include <cstdint>
#include <string>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/enums.h"
#include "common/launch.h"
#include "common/parameter.h"
#include "cuda/philox.cuh"

namespace pelt::gated_adapter {

constexpr int kMaxRank = 512;

struct Inputs {
  DType dtype = DType::kBF16;
  int B = 0;
  int S = 0;
  int D = 0;
  int R = 0;

  const void* x = nullptr;              // [B, S, D]
  Parameter w_down;                     // [R, D] | [M, R, D]
  Parameter b_down;                     // [R] | [M, R]
  Parameter w_up;                       // [D, R] | [M_up, D, R]
  Parameter b_up;                       // [D] | [M_up, D]
  const int64_t* down_index = nullptr;  // [] | [B]
  const int64_t* up_index = nullptr;    // [] | [B]
  Parameter pre_norm_weight;            // [D]
  Parameter pre_norm_bias;              // [D]
  Parameter post_norm_weight;           // [D]
  Parameter post_norm_bias;             // [D]
  Parameter scale;                      // []
  Parameter gate;                       // [B] | [B, S]
  Parameter gate_weight;                // [D]
  Parameter gate_bias;                  // [1]
  const bool* mask = nullptr;           // [B, S]
  const void* residual = nullptr;       // [B, S, D]

  int down_members = 1;  // M, the banks' sizes; 1 also for a single weight
  int up_members = 1;    // M_up
  bool has_down_index_per_sample = false;
  bool has_up_index_per_sample = false;
  bool has_gate_per_row = false;
  Activation activation = Activation::kRelu;
  Pooling pooling = Pooling::kNone;
  ResidualFrom residual_from = ResidualFrom::kInput;
  float scale_value = 1.0f;
  float pre_norm_eps = 1e-5f;
  float post_norm_eps = 1e-5f;
  float skip_below = 0.0f;
  bool has_skip = false;
  Dropout dropout;

  PELT_HOST_DEVICE bool has_learned_gate() const { return gate_weight.data != nullptr; }
  PELT_HOST_DEVICE bool has_pooled_gate() const {
    return has_learned_gate() && pooling != Pooling::kToken;
  }
  PELT_HOST_DEVICE bool has_pre_norm() const { return pre_norm_weight.data != nullptr; }
  PELT_HOST_DEVICE bool has_post_norm() const { return post_norm_weight.data != nullptr; }
};

// How rows are cut into tiles. A tile never crosses a group: the sentence, where weights or a
// pooled gate differ from one sentence to the next, otherwise all rows.
struct Tiling {
  int groups = 1;
  int64_t group_rows = 0;
  int tiles_per_group = 0;
  int tiles = 0;
  int wave_tiles = 0;  // what the blocks work on together before they go on: whole groups
};

struct ForwardParams {
  Inputs in;
  void* y = nullptr;            // [B, S, D]
  void* h = nullptr;            // [B, S, R], before the activation
  float* gate_value = nullptr;  // [B] | [B, S] of a learned gate
  float* gate_partial =
      nullptr;              // [tiles, 2]: a tile's sum of gates, and its number of rows that count
  int* arrivals = nullptr;  // [B]: tiles of a sentence whose partial sum is there
  Tiling tiling;
};

struct BackwardParams {
  Inputs in;
  const void* dy = nullptr;           // [B, S, D]
  const void* h = nullptr;            // [B, S, R]
  const float* gate_value = nullptr;  // [B] | [B, S]

  void* dx = nullptr;               // [B, S, D]
  ParameterGrad dw_down;            // [R, D] | [M, R, D]
  ParameterGrad db_down;            // [R] | [M, R]
  ParameterGrad dw_up;              // [D, R] | [M_up, D, R]
  ParameterGrad db_up;              // [D] | [M_up, D]
  ParameterGrad dpre_norm_weight;   // [D]
  ParameterGrad dpre_norm_bias;     // [D]
  ParameterGrad dpost_norm_weight;  // [D]
  ParameterGrad dpost_norm_bias;    // [D]
  ParameterGrad dscale;             // []
  ParameterGrad dgate;              // [B] | [B, S]
  ParameterGrad dgate_weight;       // [D]
  ParameterGrad dgate_bias;         // [1]

  // Between the two kernels, and between the blocks of the second; see BackwardPlan.
  void* dh = nullptr;            // [B, S, R]
  void* du = nullptr;            // [B, S, D], gradient of W_up phi(h) + b_up; with a post-norm only
  float* row_scalars = nullptr;  // [kRowScalars, B * S]
  float* norm_partial = nullptr;  // [tiles * 4 warps, 2 for each norm, D]: weight, bias
  float* gate_partial =
      nullptr;  // [tiles, 2]: a tile's sum of dots, and its number of rows that count
  float* weight_partial = nullptr;  // for each tile of the weights' gradients, for each split
  int* arrivals = nullptr;          // [B]
  int* tickets = nullptr;           // for each tile of the weights' gradients
  int splits = 1;                   // parts of the rows that are summed by different blocks
  Tiling tiling;
};

// What the first backward kernel leaves for the second of each row.
enum RowScalar {
  kFactor,  // of dy after dropout: scale g; 1 with a post-norm, where du is in memory
  kDot,     // dy . dropout(post_norm(u)), which the gradients of gate and scale are sums of
  kLogit,   // of a learned gate: first w . x + b, then its gradient
  kMean,    // of x, with a pre-norm
  kRstd,
  kRowScalars
};

// Where the pieces of backward's workspace are, in bytes.
struct BackwardPlan {
  Tiling tiling;
  int members = 1;       // of the larger bank
  int column_tiles = 0;  // tiles of a weight's gradient: 64 columns by a block of ranks
  int rank_tiles = 0;
  int splits = 1;
  int64_t arrivals = 0;  // and tickets behind them: one stretch of zeros
  int64_t zeroed_bytes = 0;
  int64_t gate_partial = 0;
  int64_t row_scalars = 0;
  int64_t norm_partial = 0;
  int64_t weight_partial = 0;
  int64_t dh = 0;
  int64_t du = 0;
  int64_t total_bytes = 0;
};

// Why the kernels refuse a call, with numbers; empty if they serve it.
std::string why_not(DType dtype, int64_t B, int64_t S, int64_t D, int64_t R);

// Bytes of device memory that a launch needs beside its inputs and outputs.
int64_t forward_workspace_bytes(const Inputs& in);
int64_t backward_workspace_bytes(const Inputs& in);

void launch_gated_adapter_fwd(const ForwardParams& params, void* workspace, Stream stream);
void launch_gated_adapter_bwd(const BackwardParams& params, void* workspace, Stream stream);

// One for each architecture's files; launch.cpp chooses.
void launch_gated_adapter_fwd_sm80(ForwardParams params, void* workspace, Stream stream);
void launch_gated_adapter_bwd_sm80(BackwardParams params, void* workspace, Stream stream);

void launch_gated_adapter_bwd_weights_sm80(const BackwardParams& params, const BackwardPlan& plan,
                                           Stream stream);

Tiling make_tiling(const Inputs& in);
BackwardPlan plan_backward(const Inputs& in);

}  // namespace pelt::gated_adapter
