// The names of the activations, for hosts and devices.
#pragma once

namespace pelt {

// The numbers are part of the binding: Python passes them as integers.
enum class Activation : int {
  kRelu = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kSilu = 3,
  kTanh = 4,
  kIdentity = 5
};

constexpr int kActivations = 6;

}  // namespace pelt
