// Functions as the hardware has them, by approximation; 2^x is in exp2.cuh.
#pragma once

namespace pelt {

// The logarithm to base 2, absolute error 2^-22 between 1/2 and 2, relative error 2^-22 elsewhere.
__device__ __forceinline__ float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, relative error 2^-23. A subnormal number gives infinity, a NaN stays one.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace pelt
