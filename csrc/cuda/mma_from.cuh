// mma: D = A B + C, where C has registers of its own, which stay: for sums that begin with what many
// of them begin with. Fragments lie as in mma.cuh.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/fragment.cuh"

namespace pelt {

// T is bf16 or f16, the type of A and B.
template <class T>
__device__ __forceinline__ void mma_m16n8k16_from(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_m16n8k16_from<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2],
                                                        const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16_from<f16>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2],
                                                       const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// d = a b + c.
template <class T>
__device__ __forceinline__ void multiply_from(FragmentD& d, const FragmentA& a, const FragmentB& b,
                                              const FragmentD& c) {
  mma_m16n8k16_from<T>(d.r, a.r, b.r, c.r);
}

}  // namespace pelt
