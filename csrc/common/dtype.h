// The element types of the project, the same for nvcc and for a host compiler without the toolkit.
//
// bf16 and f16 are bit patterns: arithmetic happens in float32, and the only operations are the two
// conversions. On the device they are the hardware's instructions, on the host bit arithmetic that
// rounds in the same way (to nearest, ties to even; subnormals kept; overflow to infinity).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PELT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PELT_HOST_DEVICE inline
#endif

namespace pelt {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// The numbers are part of the binding: Python passes them as integers.
enum class DType : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

inline const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kF16 ? "float16" : "bfloat16";
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::kF16;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBF16;
};

PELT_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PELT_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

PELT_HOST_DEVICE float to_float(float value) { return value; }

PELT_HOST_DEVICE float to_float(bf16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

PELT_HOST_DEVICE float to_float(f16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  // A subnormal half is mantissa * 2^-24, which float32 holds exactly.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return sign ? -magnitude : magnitude;
#endif
}

// round_to<T>(value): the nearest T, ties to even.
template <class T>
PELT_HOST_DEVICE T round_to(float value);

template <>
PELT_HOST_DEVICE float round_to<float>(float value) {
  return value;
}

template <>
PELT_HOST_DEVICE bf16 round_to<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  // A NaN must not be rounded up into infinity: the hardware returns one canonical NaN.
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
PELT_HOST_DEVICE f16 round_to<f16>(float value) {
#if defined(__CUDA_ARCH__)
  return f16{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{0x7fff};
  // 65520 is half way between the largest half and the next power of two; the tie goes to infinity.
  if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 makes float32's own rounding cut at 2^-24.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

struct Float2 {
  float low;  // the element at the lower address
  float high;
};

// Two elements in one 32-bit register, as fragments and vector accesses hold them. On the device
// this is one cvt instruction for both halves.
template <class T>
PELT_HOST_DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  if constexpr (DTypeOf<T>::value == DType::kBF16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &both, sizeof(bits));
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    memcpy(&bits, &both, sizeof(bits));
  }
  return bits;
#else
  return static_cast<uint32_t>(round_to<T>(low).bits) |
         static_cast<uint32_t>(round_to<T>(high).bits) << 16;
#endif
}

template <class T>
PELT_HOST_DEVICE Float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair & 0xffffu)}),
          to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

}  // namespace pelt
