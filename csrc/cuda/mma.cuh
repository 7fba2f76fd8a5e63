// mma: D = A B + D on one warp, A [16, 16] row-major, B [16, 8] column-major, D [16, 8] in float32.
// Lane l holds, with i = l / 4 and j = 2 (l % 4), these elements (row, column) of the tiles; a and b
// hold two neighbours in each register:
//
//   A   a[0]  (i, j) (i, j+1)          a[1]  (i+8, j) (i+8, j+1)
//       a[2]  (i, j+8) (i, j+9)        a[3]  (i+8, j+8) (i+8, j+9)
//   B   b[0]  (j, i) (j+1, i)          b[1]  (j+8, i) (j+9, i)
//   D   d[0]  (i, j)                   d[1]  (i, j+1)
//       d[2]  (i+8, j)                 d[3]  (i+8, j+1)
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pelt {

// T is bf16 or f16, the type of A and B.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace pelt
