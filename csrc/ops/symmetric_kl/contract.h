// symmetric_kl as its kernels see it, in the order in which a call comes from Python.
// Generated from pelt_kernels/ops/symmetric_kl/contract.py by
// `python -m pelt_kernels.ops.cpp_header`.
#pragma once

#include "common/enums.h"
#include "common/native_call.h"

namespace pelt::symmetric_kl {

enum Input : int {
  kZ1,    // activation  [T, C]
  kZ2,    // activation  [T, C]
  kMask,  // bool?  [T]
  kInputs
};

enum Output : int {
  kLoss,  // float32
  kLse,   // float32
  kOutputs
};

struct Contract {
  static constexpr int kInputCount = kInputs;
  static constexpr int kOutputCount = kOutputs;
  static constexpr int kViews = 2;  // the first inputs, read through their strides
  static constexpr bool kHasSeed = false;

  template <class Int>
  struct Sizes {
    Int T = 1;
    Int C = 1;
  };

  struct Attributes {};

  template <class Visit, class... Of>
  static void for_each_size(Visit&& visit, Of&... of) {
    visit(of.T...);
    visit(of.C...);
  }

  template <class Visit, class... Of>
  static void for_each_attribute(Visit&&, Of&...) {}
};

}  // namespace pelt::symmetric_kl
