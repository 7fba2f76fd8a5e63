// The choice among activations, for hosts and devices.
#pragma once

#include "common/dtype.h"
#include "common/enums.h"

namespace pelt {

constexpr int kActivations = 6;

// An activation as a type.
template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// visit(ActivationTag) chooses once, outside of the loops that are compiled for each activation.
template <class Visit>
PELT_HOST_DEVICE void with_activation(Activation activation, Visit&& visit) {
  switch (activation) {
    case Activation::kRelu:
      return visit(ActivationTag<Activation::kRelu>{});
    case Activation::kGelu:
      return visit(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return visit(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return visit(ActivationTag<Activation::kSilu>{});
    case Activation::kTanh:
      return visit(ActivationTag<Activation::kTanh>{});
    case Activation::kIdentity:
      return visit(ActivationTag<Activation::kIdentity>{});
  }
}

}  // namespace pelt
