// gated_adapter on the CPU: one call, and what serves it. The formula and the inputs' shapes are in
// params.h, which belongs to the CUDA kernels.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/enums.h"
#include "cpu/isa.h"

namespace pelt::gated_adapter {

// The contract's inputs, in its order.
enum Input : int {
  kX,
  kWDown,
  kBDown,
  kWUp,
  kBUp,
  kDownIndex,
  kUpIndex,
  kPreNormWeight,
  kPreNormBias,
  kPostNormWeight,
  kPostNormBias,
  kScale,
  kGate,
  kGateWeight,
  kGateBias,
  kMask,
  kResidual,
  kInputs
};

struct CpuCall {
  cpu::Isa isa = cpu::Isa::kBaseline;  // whose kernels serve it
  DType dtype = DType::kF32;           // of activations; kF32 or kBF16
  uint32_t masters = 0;                // bit i: input i is float32 beside 16-bit activations
  int64_t B = 0, S = 0, D = 0, R = 0;
  int64_t M = 1, M_up = 1;  // the banks' sizes; 1 also for a single weight
  bool has_down_index_per_sample = false;
  bool has_up_index_per_sample = false;
  bool has_gate_per_row = false;
  Activation activation = Activation::kRelu;
  Pooling pooling = Pooling::kNone;
  ResidualFrom residual_from = ResidualFrom::kInput;
  float scale_value = 1.0f;
  float pre_norm_eps = 1e-5f;
  float post_norm_eps = 1e-5f;
  bool has_skip = false;
  float skip_below = 0.0f;
  uint32_t dropout_threshold = 0;  // 0: no dropout
  float dropout_scale = 1.0f;

  // Of each call anew.
  uint64_t seed = 0;
  int threads = 1;
  const void* input[kInputs] = {};  // null: not there
  void* y = nullptr;                // [B, S, D], written by forward
  void* h = nullptr;                // [B, S, R], before the activation: written by forward
  float* gate_value = nullptr;      // [B] | [B, S] of a learned gate: written by forward
  const void* dy = nullptr;         // [B, S, D]
  void* grad[kInputs] = {};         // in the input's dtype; null: not wanted
  void* workspace = nullptr;
};

template <cpu::Isa kIsa>
int64_t cpu_forward_workspace_bytes(const CpuCall& call);
template <cpu::Isa kIsa>
void cpu_forward(const CpuCall& call);

template <cpu::Isa kIsa>
int64_t cpu_backward_workspace_bytes(const CpuCall& call);
template <cpu::Isa kIsa>
void cpu_backward(const CpuCall& call);

}  // namespace pelt::gated_adapter
