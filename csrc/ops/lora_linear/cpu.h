// lora_linear on the CPU: what is around the base product, which torch computes. Shapes are the
// contract's (pelt_kernels/ops/lora_linear/contract.py), in its letters.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/enums.h"
#include "cpu/isa.h"

namespace pelt::lora_linear {

constexpr int kCpuBranches = 16;
constexpr int kCpuGates = 32;  // learned ones: those of branches and the extra ones

// A parameter and its gradient, both in the activation's type or in float32 beside bfloat16.
struct CpuParameter {
  const void* data = nullptr;  // null: not there
  void* grad = nullptr;        // null: not wanted
  bool is_float32 = false;
};

struct CpuBranch {
  int64_t R = 0, size = 0, offset = 0;
  int64_t M = 1, N = 1;  // the banks' sizes; 1 also for a single factor
  float scale = 1.0f;
  bool has_a_index_per_sample = false;
  bool has_b_index_per_sample = false;
  bool has_gate_per_row = false;
  int learned_gate = -1;             // its number in CpuCall::gate
  CpuParameter a;                    // [R, Din] | [M, R, Din]
  CpuParameter b;                    // [size, R] | [N, size, R]
  CpuParameter gate;                 // [B] | [B, S]
  const int64_t* a_index = nullptr;  // [] | [B]
  const int64_t* b_index = nullptr;  // [] | [B]
};

struct CpuGate {
  Pooling pooling = Pooling::kMean;
  CpuParameter weight;            // [Din]
  CpuParameter bias;              // [1]
  float* value = nullptr;         // [B] | [B, S]: written by forward, read by backward
  const float* dvalue = nullptr;  // the same, of an extra gate: given to backward
};

struct CpuCall {
  cpu::Isa isa = cpu::Isa::kBaseline;  // whose kernels serve it
  DType dtype = DType::kF32;           // of activations; kF32 or kBF16
  int64_t B = 0, S = 0, Din = 0, Dout = 0;
  int branches = 0;
  int gates = 0;
  CpuBranch branch[kCpuBranches];
  CpuGate gate[kCpuGates];
  uint32_t dropout_threshold = 0;  // 0: no dropout
  float dropout_scale = 1.0f;

  // Of each call anew.
  uint64_t seed = 0;
  int threads = 1;
  const void* x = nullptr;     // [B, S, Din]
  const bool* mask = nullptr;  // [B, S]
  void* y = nullptr;           // [B, S, Dout]: the base product, to which forward adds
  void* s = nullptr;           // [B, S, the ranks' sum]: written by forward, read by backward
  const void* dy = nullptr;    // [B, S, Dout]
  void* dx = nullptr;          // [B, S, Din]: dy times the base weight, to which backward adds
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

}  // namespace pelt::lora_linear
