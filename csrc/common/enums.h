// Words of the contracts as numbers. They are part of the binding: Python passes them as integers.
#pragma once

namespace pelt {

// How the rows' learned gates become those of a sentence.
enum class Pooling : int {
  kNone = 0,  // there is no learned gate
  kToken = 1,
  kMean = 2,
  kMaskedMean = 3
};

// What an adapter's output is added to.
enum class ResidualFrom : int { kInput = 0, kNone = 1, kTensor = 2 };

}  // namespace pelt
