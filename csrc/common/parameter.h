// Parameters and their gradients as kernels take them.
#pragma once

namespace pelt {

// A tensor in the activation's dtype, or in float32 beside 16-bit activations.
struct Parameter {
  const void* data = nullptr;  // null: not there
  bool is_float32 = false;
};

// A gradient, which has its parameter's dtype.
struct ParameterGrad {
  void* data = nullptr;  // null: not wanted
  bool is_float32 = false;
};

}  // namespace pelt
