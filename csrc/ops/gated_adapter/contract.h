// gated_adapter as its kernels see it, in the order in which a call comes from Python.
// Generated from pelt_kernels/ops/gated_adapter/contract.py by
// `python -m pelt_kernels.ops.cpp_header`.
#pragma once

#include <cmath>

#include "common/enums.h"
#include "common/native_call.h"

namespace pelt::gated_adapter {

enum Input : int {
  kX,               // activation  [B, S, D]
  kWDown,           // parameter  [R, D] | [M, R, D]
  kBDown,           // parameter?  [R] | [M, R]
  kWUp,             // parameter  [D, R] | [M_up, D, R]
  kBUp,             // parameter?  [D] | [M_up, D]
  kDownIndex,       // index?  [] | [B]
  kUpIndex,         // index?  [] | [B]
  kPreNormWeight,   // parameter?  [D] | [M, D]
  kPreNormBias,     // parameter?  [D] | [M, D]
  kPostNormWeight,  // parameter?  [D] | [M_up, D]
  kPostNormBias,    // parameter?  [D] | [M_up, D]
  kScale,           // parameter?  []
  kGate,            // parameter?  [B] | [B, S]
  kGateWeight,      // parameter?  [D]
  kGateBias,        // parameter?  [1]
  kMask,            // bool?  [B, S]
  kResidual,        // activation?  [B, S, D]
  kInputs
};

enum Output : int {
  kY,          // activation
  kGateValue,  // float32
  kH,          // activation
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
    Int D = 1;
    Int R = 1;
    Int M = 1;
    Int M_up = 1;
  };

  struct Attributes {
    Activation activation = Activation::kRelu;
    Pooling pooling = Pooling::kNone;
    ResidualFrom residual_from = ResidualFrom::kInput;
    float scale_value = 1.0f;
    float pre_norm_eps = 1e-05f;
    float post_norm_eps = 1e-05f;
    Dropout dropout;  // of probability dropout_p; the seed comes with each call
    float skip_below = -INFINITY;
  };

  template <class Visit, class... Of>
  static void for_each_size(Visit&& visit, Of&... of) {
    visit(of.B...);
    visit(of.S...);
    visit(of.D...);
    visit(of.R...);
    visit(of.M...);
    visit(of.M_up...);
  }

  template <class Visit, class... Of>
  static void for_each_attribute(Visit&& visit, Of&... of) {
    visit(of.activation...);
    visit(of.pooling...);
    visit(of.residual_from...);
    visit(of.scale_value...);
    visit(of.pre_norm_eps...);
    visit(of.post_norm_eps...);
    visit(of.dropout...);
    visit(of.skip_below...);
  }
};

}  // namespace pelt::gated_adapter
