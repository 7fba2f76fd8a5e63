// ldmatrix: 8x8 matrices of 2-byte elements from shared memory into the registers of a warp.
//
// The address of row r of matrix m is the one that lane 8 m + r passes. Lane l receives, of each
// matrix, the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1), which is the layout of mma
// operands; .trans exchanges row and column.
//
//   lanes of one matrix   row 0    0  0  1  1  2  2  3  3
//                         row 1    4  4  5  5  6  6  7  7
//                         row 7   28 28 29 29 30 30 31 31
//
// Its eight rows are read together: without padding or swizzle they would share banks. No "memory"
// is clobbered: between a store and these, either way round, a barrier stands, which orders both.
#pragma once

#include "cuda/memory.cuh"

namespace pelt {

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&result)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(result[0])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&result)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&result)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(result[0])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&result)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row)));
}

// The same from a 32-bit address of shared memory and a constant number of bytes behind it, which is
// part of the instruction: loops that read many fragments keep one address for all of them.

template <int kBytes>
__device__ __forceinline__ void ldmatrix_x2_at(uint32_t (&result)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2 + %3];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(row), "n"(kBytes));
}

template <int kBytes>
__device__ __forceinline__ void ldmatrix_x4_at(uint32_t (&result)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(row), "n"(kBytes));
}

template <int kBytes>
__device__ __forceinline__ void ldmatrix_x4_trans_at(uint32_t (&result)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(row), "n"(kBytes));
}

}  // namespace pelt
