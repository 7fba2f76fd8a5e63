// masked_weight as its kernels see it, in the order in which a call comes from Python.
// Generated from pelt_kernels/ops/masked_weight/contract.py by
// `python -m pelt_kernels.ops.cpp_header`.
#pragma once

#include "common/enums.h"
#include "common/native_call.h"

namespace pelt::masked_weight {

enum Input : int {
  kW0,   // activation  [Dout, Din]
  kU,    // parameter  [Dout, R]
  kV,    // parameter  [R, Din]
  kA,    // parameter  [Dout, R2]
  kB,    // parameter  [R2, Din]
  kRow,  // parameter  [Dout]
  kCol,  // parameter  [Din]
  kInputs
};

enum Output : int {
  kY,     // activation
  kMask,  // bool
  kOutputs
};

struct Contract {
  static constexpr int kInputCount = kInputs;
  static constexpr int kOutputCount = kOutputs;
  static constexpr int kViews = 1;  // the first inputs, read through their strides
  static constexpr bool kHasSeed = false;

  template <class Int>
  struct Sizes {
    Int Dout = 1;
    Int Din = 1;
    Int R = 1;
    Int R2 = 1;
  };

  struct Attributes {
    int64_t keep = 0;
    float beta = 1.0f;
    float alpha1 = 1.0f;
    float alpha2 = 1.0f;
  };

  template <class Visit, class... Of>
  static void for_each_size(Visit&& visit, Of&... of) {
    visit(of.Dout...);
    visit(of.Din...);
    visit(of.R...);
    visit(of.R2...);
  }

  template <class Visit, class... Of>
  static void for_each_attribute(Visit&& visit, Of&... of) {
    visit(of.keep...);
    visit(of.beta...);
    visit(of.alpha1...);
    visit(of.alpha2...);
  }
};

}  // namespace pelt::masked_weight
