// A float32 as three numbers of 16 bits, whose products with 16-bit elements an mma adds up in
// float32: what weights the rows of a sum [D] is that way one more operand beside those of a product
// with the same rows.
#pragma once

#include "cuda/device.cuh"
#include "ops/gated_adapter/params.h"

namespace pelt::gated_adapter {

constexpr int kParts = 3;
static_assert(kParts <= kPartsStride, "a row's parts have places");

// Between neighbouring parts. bfloat16 has float32's exponents; in float16 a small number, such as a
// pooled gate's dlogit, would vanish, and a part with 2^11 times the rest keeps it.
template <class T>
constexpr float kPartScale = DTypeOf<T>::value == DType::kF16 ? 2048.0f : 1.0f;

// What is left of `value` after each part goes into the next; the vector's other elements are zero.
template <class T>
__device__ __forceinline__ Words4 split_into_parts(float value) {
  float parts[kParts + 1] = {};
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = to_float(round_to<T>(value));
    // Nothing is left of infinity and NaN, nor of what T has no finite number for.
    value = fabsf(parts[i]) < INFINITY ? (value - parts[i]) * kPartScale<T> : 0.0f;
  }
  return {{pack<T>(parts[0], parts[1]), pack<T>(parts[2], 0.0f), 0, 0}};
}

// The sum whose terms were split, from the parts' sums. Where the first is not finite, an element
// was not, and the others may be 0 times infinity.
template <class T>
__device__ __forceinline__ float join_parts(const float (&sums)[kParts]) {
  if (!(fabsf(sums[0]) < INFINITY)) return sums[0];
  return sums[0] + (sums[1] + sums[2] / kPartScale<T>) / kPartScale<T>;
}

}  // namespace pelt::gated_adapter
