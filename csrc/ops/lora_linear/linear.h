// A call of lora_linear as its kernels walk it: a Linear, its branches and its learned gates, each
// with all that belongs to it. In the contract's order (contract.h) the same values are lists
// beside each other, in which learned gates of branches and extra ones stand apart.
#pragma once

#include "common/enums.h"
#include "ops/lora_linear/contract.h"

namespace pelt::lora_linear {

// `Int` counts sizes. `Target` is a part of the type's name alone, so that no linker takes
// functions of one instruction set for those of another (see cpu/isa.h).
template <class Int, int kMostBranches, int kMostGates, class Target>
struct BasicLinear {
  // What a kernel looks up by a branch's number stands first, gradients last: between the other
  // fields they cost two kernels 12 registers and a spill (nvcc 13.0, sm_80).
  struct Branch {
    Parameter a;                       // [R, Din] | [M, R, Din]
    Parameter b;                       // [size, R] | [N, size, R]
    const int64_t* a_index = nullptr;  // [] | [B]
    const int64_t* b_index = nullptr;  // [] | [B]
    Parameter gate;                    // [B] | [B, S]
    int learned_gate = -1;             // its number in `gate` below; -1: none
    Int R = 0;
    Int size = 0;
    Int offset = 0;
    Int first = 0;  // its first column of s
    float scale = 1.0f;
    Int M = 1, N = 1;  // the banks' sizes; 1 also for a single factor
    bool has_a_index_per_sample = false;
    bool has_b_index_per_sample = false;
    bool has_gate_per_row = false;
    ParameterGrad da, db, dgate;  // shaped as the parameters
  };

  struct Gate {
    Parameter weight;        // [Din]
    Parameter bias;          // [1]
    float* value = nullptr;  // [B] | [B, S]: written by forward, read by backward
    Pooling pooling = Pooling::kMean;
    int branch = -1;                // whose gate it is; -1: an extra one
    ParameterGrad dweight, dbias;   // shaped as the parameters
    const float* dvalue = nullptr;  // as the value, of an extra gate: given to backward
  };

  DType dtype = DType::kBF16;  // of activations
  Int B = 0;
  Int S = 0;
  Int Din = 0;
  Int Dout = 0;
  Int ranks = 0;  // the sum of R: columns of s
  int branches = 0;
  int gates = 0;  // learned ones: those of branches, then the extra ones

  const void* x = nullptr;     // [B, S, Din]
  const bool* mask = nullptr;  // [B, S]
  void* y = nullptr;           // [B, S, Dout]
  void* s = nullptr;           // [B, S, ΣR]: written by forward, read by backward
  const void* dy = nullptr;    // [B, S, Dout]
  void* dx = nullptr;          // [B, S, Din]
  Dropout dropout;
  Branch branch[kMostBranches];
  Gate gate[kMostGates];

  // Branches and gates beyond the most are left out: why_not has refused the call, or is about to.
  static BasicLinear of(const NativeCall<Contract, Int>& call) {
    BasicLinear linear;
    linear.dtype = call.dtype;
    linear.B = call.B, linear.S = call.S, linear.Din = call.Din, linear.Dout = call.Dout;
    linear.x = call.input[kX];
    linear.mask = call.template input_as<bool>(kMask);
    linear.y = call.output[kY], linear.s = call.output[kS];
    linear.dy = call.doutput[kY], linear.dx = call.grad[kX];
    linear.dropout = call.dropout;
    for (int i = 0; i < call.R_i.count && i < kMostBranches; ++i) linear.add_branch(call, i);
    for (int j = 0; j < call.extra_poolings.count && linear.gates < kMostGates; ++j) {
      Gate& gate = linear.gate[linear.gates++];
      gate = gate_at(call, kExtraWeight + j, kExtraBias + j, kExtraGates + j);
      gate.dvalue = call.template doutput_as<float>(kExtraGates + j);
      gate.pooling = call.extra_poolings[j];
    }
    return linear;
  }

 private:
  void add_branch(const NativeCall<Contract, Int>& call, int i) {
    Branch& to = branch[branches];
    to.a = call.parameter(kA + i), to.da = call.parameter_grad(kA + i);
    to.b = call.parameter(kB + i), to.db = call.parameter_grad(kB + i);
    to.gate = call.parameter(kGate + i), to.dgate = call.parameter_grad(kGate + i);
    to.a_index = call.template input_as<int64_t>(kAIndex + i);
    to.b_index = call.template input_as<int64_t>(kBIndex + i);
    to.scale = call.scales[i];
    to.R = call.R_i[i], to.size = call.size_i[i];
    to.offset = static_cast<Int>(call.offsets[i]);
    to.first = ranks;
    // The dimensions of the tensors tell which of their shapes they have.
    if (call.rank[kA + i] == 3) to.M = call.M_i[i];
    if (call.rank[kB + i] == 3) to.N = call.N_i[i];
    to.has_a_index_per_sample = call.rank[kAIndex + i] == 1;
    to.has_b_index_per_sample = call.rank[kBIndex + i] == 1;
    to.has_gate_per_row = call.rank[kGate + i] == 2;
    ranks += to.R;
    if (call.poolings[i] != Pooling::kNone && gates < kMostGates) {
      to.learned_gate = gates;
      Gate& own = gate[gates++];
      own = gate_at(call, kGateWeight + i, kGateBias + i, kGateValues + i);
      own.pooling = call.poolings[i];
      own.branch = branches;
    }
    ++branches;
  }

  static Gate gate_at(const NativeCall<Contract, Int>& call, int weight, int bias, int value) {
    Gate gate;
    gate.weight = call.parameter(weight), gate.dweight = call.parameter_grad(weight);
    gate.bias = call.parameter(bias), gate.dbias = call.parameter_grad(bias);
    gate.value = call.template output_as<float>(value);
    return gate;
  }
};

namespace {

// The learned gates of a call, those of branches and the extra ones.
template <class Call>
int gate_count(const Call& call) {
  int count = call.extra_poolings.count;
  constexpr int kRoom = kB - kA;  // in a list
  for (int i = 0; i < call.poolings.count && i < kRoom; ++i) {
    if (call.poolings[i] != Pooling::kNone) ++count;
  }
  return count;
}

}  // namespace
}  // namespace pelt::lora_linear
