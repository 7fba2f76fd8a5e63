// lora_linear as its kernels see it, in the order in which a call comes from Python.
// Generated from pelt_kernels/ops/lora_linear/contract.py by
// `python -m pelt_kernels.ops.cpp_header`.
#pragma once

#include "common/enums.h"
#include "common/native_call.h"

namespace pelt::lora_linear {

enum Input : int {
  kX,                              // activation  [B, S, Din]
  kWeight,                         // parameter  [Dout, Din] | [Din, Dout]
  kBias,                           // parameter?  [Dout]
  kA,                              // parameter*  [R_i, Din] | [M_i, R_i, Din]
  kB = kA + 32,                    // parameter*  [size_i, R_i] | [N_i, size_i, R_i]
  kAIndex = kB + 32,               // index?*  [] | [B]
  kBIndex = kAIndex + 32,          // index?*  [] | [B]
  kGate = kBIndex + 32,            // parameter?*  [B] | [B, S]
  kGateWeight = kGate + 32,        // parameter?*  [Din]
  kGateBias = kGateWeight + 32,    // parameter?*  [1]
  kExtraWeight = kGateBias + 32,   // parameter*  [Din]
  kExtraBias = kExtraWeight + 32,  // parameter*  [1]
  kMask = kExtraBias + 32,         // bool?  [B, S]
  kInputs
};

enum Output : int {
  kY,                              // activation
  kExtraGates,                     // float32
  kGateValues = kExtraGates + 32,  // float32
  kS = kGateValues + 32,           // activation
  kOutputs
};

struct Contract {
  static constexpr int kInputCount = kInputs;
  static constexpr int kOutputCount = kOutputs;
  static constexpr int kViews = 0;  // the first inputs, read through their strides
  static constexpr bool kHasSeed = true;

  template <class Int>
  struct Sizes {
    Int B = 1;
    Int S = 1;
    Int Din = 1;
    Int Dout = 1;
    List<Int, 32> R_i;
    List<Int, 32> M_i;
    List<Int, 32> size_i;
    List<Int, 32> N_i;
  };

  struct Attributes {
    bool transposed = false;
    List<int64_t, 32> offsets;
    List<float, 32> scales;
    List<Pooling, 32> poolings;
    List<Pooling, 32> extra_poolings;
    Dropout dropout;  // of probability dropout_p; the seed comes with each call
  };

  template <class Visit, class... Of>
  static void for_each_size(Visit&& visit, Of&... of) {
    visit(of.B...);
    visit(of.S...);
    visit(of.Din...);
    visit(of.Dout...);
    visit(of.R_i...);
    visit(of.M_i...);
    visit(of.size_i...);
    visit(of.N_i...);
  }

  template <class Visit, class... Of>
  static void for_each_attribute(Visit&& visit, Of&... of) {
    visit(of.transposed...);
    visit(of.offsets...);
    visit(of.scales...);
    visit(of.poolings...);
    visit(of.extra_poolings...);
    visit(of.dropout...);
  }
};

}  // namespace pelt::lora_linear
