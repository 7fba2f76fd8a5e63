// Sums over the lanes of a warp, in a fixed order: two runs give the same bits.
#pragma once

#include "common/dtype.h"
#include "cuda/index.cuh"
#include "cuda/shuffle.cuh"

namespace pelt {

// The sum over kLanes neighbouring lanes (a power of two), which every one of them gets.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value) {
  static_assert(kLanes > 0 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0,
                "a group of lanes is a power of two up to 32");
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_sum(float value) { return group_sum<32>(value); }

// Mean and squared deviations of a set of values, in a form in which two sets can be merged. A
// plain sum of squares would lose the variance of values that are far from zero (Chan, Golub and
// LeVeque 1979).
struct Moments {
  float count = 0.0f;
  float mean = 0.0f;
  float squares = 0.0f;  // sum of (value - mean)^2

  PELT_HOST_DEVICE void add(float value) {
    count += 1.0f;
    const float delta = value - mean;
    mean += delta / count;
    squares += delta * (value - mean);
  }

  // The moments of a few values at once, with one division instead of one for each.
  template <int kCount>
  PELT_HOST_DEVICE static Moments of(const float (&values)[kCount]) {
    float sum = 0.0f, squares = 0.0f;
    for (int i = 0; i < kCount; ++i) sum += values[i];
    const float mean = sum / kCount;
    for (int i = 0; i < kCount; ++i) squares += (values[i] - mean) * (values[i] - mean);
    return {static_cast<float>(kCount), mean, squares};
  }

  PELT_HOST_DEVICE void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0.0f) return;
    const float delta = other.mean - mean;
    const float share = other.count / total;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }

  // 1 / sqrt(variance + eps), the variance with the divisor `count`, as LayerNorm has it.
  PELT_HOST_DEVICE float reciprocal_deviation(float eps) const {
    return 1.0f / sqrtf(squares / count + eps);
  }
};

// The moments over kLanes neighbouring lanes, which every one of them gets. Merging is symmetric in
// the two partners up to rounding only, so both compute what the lower lane computes: all lanes of
// the group then hold the same bits.
template <int kLanes>
__device__ __forceinline__ Moments group_moments(Moments own) {
  for (int mask = 1; mask < kLanes; mask *= 2) {
    Moments other{shfl_xor(own.count, mask), shfl_xor(own.mean, mask), shfl_xor(own.squares, mask)};
    if (lane_index() & mask) {
      other.merge(own);
      own = other;
    } else {
      own.merge(other);
    }
  }
  return own;
}

}  // namespace pelt
