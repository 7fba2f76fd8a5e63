// prefix_attention as its kernels see it, in the order in which a call comes from Python.
// Generated from pelt_kernels/ops/prefix_attention/contract.py by
// `python -m pelt_kernels.ops.cpp_header`.
#pragma once

#include "common/enums.h"
#include "common/native_call.h"

namespace pelt::prefix_attention {

enum Input : int {
  kQ,                           // activation  [B, H, S, E]
  kK,                           // activation  [B, G, N, E]
  kV,                           // activation  [B, G, N, E]
  kPrefixK,                     // parameter*  [P_i, G, E] | [A_i, P_i, G, E]
  kPrefixV = kPrefixK + 4,      // parameter*  [P_i, G, E] | [A_i, P_i, G, E]
  kPrefixIndex = kPrefixV + 4,  // index?*  [B]
  kGate = kPrefixIndex + 4,     // parameter?  [B] | [B, H]
  kKeyMask,                     // bool?  [B, N]
  kLengths,                     // count?  [B]
  kBias,  // parameter?  [B, H, S, N] | [1, H, S, N] | [B, 1, S, N] | [1, 1, S, N]
  kInputs
};

enum Output : int {
  kOut,  // activation
  kLse,  // float32
  kOutputs
};

struct Contract {
  static constexpr int kInputCount = kInputs;
  static constexpr int kOutputCount = kOutputs;
  static constexpr int kViews = 11;  // the first inputs, read through their strides
  static constexpr bool kHasSeed = true;

  template <class Int>
  struct Sizes {
    Int B = 1;
    Int H = 1;
    Int S = 1;
    Int E = 1;
    Int G = 1;
    Int N = 1;
    List<Int, 4> P_i;
    List<Int, 4> A_i;
  };

  struct Attributes {
    bool is_causal = false;
    float scale = 1.0f;
    Dropout dropout;  // of probability dropout_p; the seed comes with each call
  };

  template <class Visit, class... Of>
  static void for_each_size(Visit&& visit, Of&... of) {
    visit(of.B...);
    visit(of.H...);
    visit(of.S...);
    visit(of.E...);
    visit(of.G...);
    visit(of.N...);
    visit(of.P_i...);
    visit(of.A_i...);
  }

  template <class Visit, class... Of>
  static void for_each_attribute(Visit&& visit, Of&... of) {
    visit(of.is_causal...);
    visit(of.scale...);
    visit(of.dropout...);
  }
};

}  // namespace pelt::prefix_attention
