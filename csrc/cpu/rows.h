// What CPU kernels over the rows of activations [B, S, columns] share: elements of parameters,
// banks of them, gates and dropout.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/parameter.h"
#include "cpu/philox_lanes.h"
#include "cpu/vector.h"
#include "cuda/philox.cuh"

namespace pelt::cpu {
namespace {

// ---- parameters; T is the activation's type ----

// Calls visit(pointer) with the parameter's own element type.
template <class T, class Visit>
inline void with_elements(const Parameter& parameter, Visit&& visit) {
  if (parameter.is_float32) {
    visit(static_cast<const float*>(parameter.data));
  } else {
    visit(static_cast<const T*>(parameter.data));
  }
}

template <class T, class Visit>
inline void with_elements(const ParameterGrad& grad, Visit&& visit) {
  if (grad.is_float32) {
    visit(static_cast<float*>(grad.data));
  } else {
    visit(static_cast<T*>(grad.data));
  }
}

template <class T>
inline float element_of(const Parameter& parameter, int64_t i) {
  float value = 0.0f;
  with_elements<T>(parameter, [&](const auto* from) { value = load_part(from + i, 1)[0]; });
  return value;
}

template <class T>
inline void write_element(const ParameterGrad& grad, int64_t i, float value) {
  with_elements<T>(grad, [&](auto* to) { store_part(to + i, splat(value), 1); });
}

// The members of a bank that a call uses: slot 0 is the one of the batch, or slot i is member i.
struct Bank {
  int64_t slots = 1;
  const int64_t* index = nullptr;   // [B], where each sentence has its own
  const int64_t* member = nullptr;  // [], of the batch

  // Of slot 0. Not known before the call has its tensors.
  int64_t first_member() const { return member ? *member : 0; }

  int64_t slot_of(int64_t sentence) const { return index ? index[sentence] : 0; }

  bool is_used(int64_t slot, int64_t sentences) const {
    if (index == nullptr) return true;
    return std::find(index, index + sentences, slot) != index + sentences;
  }
};

inline Bank make_bank(const int64_t* index, bool is_per_sample, int64_t members) {
  Bank bank;
  if (is_per_sample) {
    bank.slots = members;
    bank.index = index;
  } else {
    bank.member = index;
  }
  return bank;
}

// ---- gates ----

// One for each row, not for each element: float64 costs nothing, and a sentence's sum of gates or
// of their gradients keeps its digits.
inline float sigmoid_of(float x) {
  return static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(x))));
}

// ---- dropout ----

// visit(i, factor) for `count` elements of row `row` of a tensor [rows, width], from column `begin`
// (a multiple of 4) on: their factors are 0 or 1 / (1 - p). `i` counts from 0.
template <class Visit>
inline void for_dropout_factors(const Dropout& dropout, int64_t row, int64_t width, int64_t begin,
                                int64_t count, Visit&& visit) {
  alignas(64) uint32_t words[4 * kPhiloxGroups];
  const int64_t group = row * ((width + 3) / 4) + begin / 4;
  for (int64_t done = 0; done < count; done += 4 * kPhiloxGroups) {
    philox_words(static_cast<uint64_t>(group + done / 4), 0, dropout.seed, words);
    const int64_t here = std::min<int64_t>(4 * kPhiloxGroups, count - done);
    for (int64_t i = 0; i < here; ++i) {
      visit(done + i, words[i] >= dropout.threshold ? dropout.keep_scale : 0.0f);
    }
  }
}

}  // namespace
}  // namespace pelt::cpu
