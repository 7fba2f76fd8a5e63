// exp, tanh, erf and the activations on vectors of floats.
//
// The polynomials are Chebyshev fits made for float32; the errors stated are the largest over the
// interval, against float64. NaN stays NaN.
#pragma once

#include "common/activation.h"
#include "cpu/vector.h"

namespace pelt::cpu {
namespace {

inline Vector absolute(Vector x) { return from_bits(bits_of(x) & 0x7fffffffu); }

inline Vector with_sign_of(Vector magnitude, Vector x) {
  return from_bits((bits_of(magnitude) & 0x7fffffffu) | (bits_of(x) & 0x80000000u));
}

// c[0] + c[1] x + ...
template <int kTerms>
inline Vector polynomial(const float (&c)[kTerms], Vector x) {
  Vector sum = splat(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// exp(x) for x <= 0; below -87 it stays at exp(-87), about 1e-38. exp(x) = 2^n exp(f) with
// f = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]; ln 2 comes in two parts, so that n ln 2 is exact.
inline Vector exp_of_negative(Vector x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  constexpr float kSeries[] = {1.0f,         1.0f,          1.0f / 2.0f,   1.0f / 6.0f,
                               1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f, 1.0f / 5040.0f};
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  return polynomial(kSeries, f) * power;
}

// 1 / (1 + exp(-x)), from exp of a negative number on either side of 0: nothing overflows.
inline Vector sigmoid(Vector x) {
  const Vector e = exp_of_negative(with_sign_of(x, splat(-1.0f)));
  const Vector reciprocal = 1.0f / (1.0f + e);
  return x < 0.0f ? e * reciprocal : reciprocal;
}

// tanh by (1 - e) / (1 + e) with e = exp(-2 |x|). Near 0 that would lose the digits of a small
// number, so there it is a polynomial (error 4e-9).
inline Vector tanh_of(Vector x) {
  constexpr float kNear[] = {0.9999999956f, -0.3333325347f, 0.1333095729f,
                             -0.053707068f, 0.02054490535f, -0.005607688718f};
  const Vector size = absolute(x);
  const Vector e = exp_of_negative(-2.0f * size);
  const Vector far = with_sign_of((1.0f - e) / (1.0f + e), x);
  return size < 0.63f ? polynomial(kNear, x * x) * x : far;
}

// erf by a polynomial in x^2 below 1 (error 1e-9), by 1 - exp(-q(|x|)) from 1 to 4 (error of q
// 3e-7), and 1 beyond, where float32 has no other number.
inline Vector erf_of(Vector x) {
  constexpr float kNear[] = {1.128379166f,    -0.376126269f,     0.1128359746f,  -0.0268543288f,
                             0.005189311943f, -0.0008018854992f, 7.882497111e-5f};
  constexpr float kFar[] = {7.569686177e-4f, 1.125925949f,  0.6390933195f,    0.1033189801f,
                            -0.02262198594f, 0.0034368676f, -3.175720349e-4f, 1.330939041e-5f};
  const Vector size = absolute(x);
  const Vector far = 1.0f - exp_of_negative(-polynomial(kFar, size > 4.0f ? splat(4.0f) : size));
  return size < 1.0f ? polynomial(kNear, x * x) * x : with_sign_of(far, x);
}

// ---- activations ----

constexpr float kRsqrt2 = 0.70710678118654752f;
constexpr float kRsqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kCubic = 0.044715f;

template <Activation kActivation>
inline Vector activate(Vector h) {
  if constexpr (kActivation == Activation::kRelu) {
    return h <= 0.0f ? Vector{} : h;  // a NaN stays one
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * h * (1.0f + erf_of(h * kRsqrt2));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return 0.5f * h * (1.0f + tanh_of(kSqrt2OverPi * (h + kCubic * h * h * h)));
  } else if constexpr (kActivation == Activation::kSilu) {
    return h * sigmoid(h);
  } else if constexpr (kActivation == Activation::kTanh) {
    return tanh_of(h);
  } else {
    return h;
  }
}

// d activate(h) / dh. At its corner relu has the derivative 0, as in PyTorch.
template <Activation kActivation>
inline Vector activation_slope(Vector h) {
  if constexpr (kActivation == Activation::kRelu) {
    return h <= 0.0f ? Vector{} : splat(1.0f);
  } else if constexpr (kActivation == Activation::kGelu) {
    const Vector density = kRsqrt2Pi * exp_of_negative(-0.5f * h * h);
    return 0.5f * (1.0f + erf_of(h * kRsqrt2)) + h * density;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const Vector t = tanh_of(kSqrt2OverPi * (h + kCubic * h * h * h));
    const Vector slope = kSqrt2OverPi * (1.0f + 3.0f * kCubic * h * h);
    return 0.5f * (1.0f + t) + 0.5f * h * (1.0f - t * t) * slope;
  } else if constexpr (kActivation == Activation::kSilu) {
    const Vector s = sigmoid(h);
    return s + h * s * (1.0f - s);
  } else if constexpr (kActivation == Activation::kTanh) {
    const Vector t = tanh_of(h);
    return 1.0f - t * t;
  } else {
    return splat(1.0f);
  }
}

}  // namespace
}  // namespace pelt::cpu
