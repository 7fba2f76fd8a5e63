// The activations of a bottleneck, value and derivative, in float32.
#pragma once

#include <cmath>

#include "common/activation.h"
#include "common/dtype.h"

namespace pelt {

// exp of a negative number only: no intermediate overflows to inf - inf or inf / inf.
PELT_HOST_DEVICE float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return x >= 0.0f ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

namespace gelu_constants {
constexpr float kRsqrt2 = 0.70710678118654752f;
constexpr float kRsqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kCubic = 0.044715f;
}  // namespace gelu_constants

PELT_HOST_DEVICE float activate(Activation activation, float x) {
  using namespace gelu_constants;
  switch (activation) {
    case Activation::kRelu:
      return x > 0.0f || x != x ? x : 0.0f;  // a NaN stays one
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * kRsqrt2));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(kSqrt2OverPi * (x + kCubic * x * x * x)));
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kTanh:
      return tanhf(x);
    case Activation::kIdentity:
      return x;
  }
  return x;
}

// d activate(x) / dx. At its corner relu has the derivative 0, as in PyTorch.
PELT_HOST_DEVICE float activation_derivative(Activation activation, float x) {
  using namespace gelu_constants;
  switch (activation) {
    case Activation::kRelu:
      return x > 0.0f ? 1.0f : 0.0f;
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(x * kRsqrt2)) + x * kRsqrt2Pi * expf(-0.5f * x * x);
    case Activation::kGeluTanh: {
      const float t = tanhf(kSqrt2OverPi * (x + kCubic * x * x * x));
      const float slope = kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope;
    }
    case Activation::kSilu: {
      const float s = sigmoid(x);
      return s + x * s * (1.0f - s);
    }
    case Activation::kTanh: {
      const float t = tanhf(x);
      return 1.0f - t * t;
    }
    case Activation::kIdentity:
      return 1.0f;
  }
  return 1.0f;
}

}  // namespace pelt
