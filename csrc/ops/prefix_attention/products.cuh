// The two products of attention, on fragments of one warp: rows by rows, which gives scores, and
// scores by rows, which accumulates outputs and gradients.
#pragma once

#include "cuda/device.cuh"

namespace pelt::prefix_attention {

// d += a b^T over rows of kE elements; operand(m, step) gives a's [16, 16] from element 16 step on.
// Each fragment of b that is loaded serves all kTilesM tiles of a.
template <class C, int kTilesM, int kTilesN, class Operand>
__device__ __forceinline__ void multiply_rows(FragmentD (&d)[kTilesM][kTilesN], Operand&& operand,
                                              const typename C::T* s_b) {
  using T = typename C::T;
#pragma unroll
  for (int step = 0; step < C::kE / 16; ++step) {  // 16 elements of a row: the depth of one mma
    FragmentA a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) a[m] = operand(m, step);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      FragmentB b[2];
      load_b_pair(b, s_b + 8 * n * C::kStride + 16 * step, C::kStride);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply_add<T>(d[m][n], a[m], b[0]);
        multiply_add<T>(d[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Two neighbouring accumulators [16, 8] as the operand [16, 16] of the next product. A lane holds
// the same elements in both layouts, so probabilities are rounded in registers and never pass
// through shared memory.
template <class T>
__device__ __forceinline__ FragmentA as_operand(const FragmentD& left, const FragmentD& right) {
  return {{pack<T>(left.r[0], left.r[1]), pack<T>(left.r[2], left.r[3]),
           pack<T>(right.r[0], right.r[1]), pack<T>(right.r[2], right.r[3])}};
}

// d += p b, where p are the accumulators of an earlier product and b rows of kE elements, which
// ldmatrix transposes as it loads them.
template <class C, int kTilesM, int kTilesN>
__device__ __forceinline__ void accumulate_rows(FragmentD (&d)[kTilesM][C::kE / 8],
                                                const FragmentD (&p)[kTilesM][kTilesN],
                                                const typename C::T* s_b) {
  using T = typename C::T;
#pragma unroll
  for (int step = 0; step < kTilesN / 2; ++step) {  // 16 columns: two accumulators of p
    FragmentA a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) a[m] = as_operand<T>(p[m][2 * step], p[m][2 * step + 1]);
#pragma unroll
    for (int n = 0; n < C::kE / 8; n += 2) {  // one ldmatrix loads two fragments of 8 columns
      FragmentB b[2];
      load_b_pair_transposed(b, s_b + 16 * step * C::kStride + 8 * n, C::kStride);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply_add<T>(d[m][n], a[m], b[0]);
        multiply_add<T>(d[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// d += rows of 16-bit elements in memory, `count` of which are there. A lane reads the pairs that
// it holds: four lanes read 16 bytes together, and the rest of the sector is what they read next.
template <class C, int kTilesM>
__device__ __forceinline__ void add_rows(FragmentD (&d)[kTilesM][C::kE / 8],
                                         const typename C::T* g_rows, int64_t stride, int count) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + FragmentD::row(2 * half);
      if (row >= count) continue;  // its result is not stored, and the memory may not exist
      const typename C::T* from = g_rows + row * stride + FragmentD::column(0);
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {  // two elements of every 8 are the lane's
        const Float2 pair = unpack<typename C::T>(load_4(from + 8 * n));
        d[m][n].r[2 * half] += pair.low;
        d[m][n].r[2 * half + 1] += pair.high;
      }
    }
  }
}

// Writes a warp's accumulators times a factor as 16-bit rows into the warp's region of shared
// memory: from there rows leave in whole vectors, which the layout of accumulators would not allow.
template <class C, int kTilesM>
__device__ __forceinline__ void put_rows(typename C::T* s_rows,
                                         const FragmentD (&d)[kTilesM][C::kE / 8], float factor) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        const int row = 16 * m + FragmentD::row(2 * half);
        store_4(
            s_rows + row * C::kStride + 8 * n + FragmentD::column(0),
            pack<typename C::T>(d[m][n].r[2 * half] * factor, d[m][n].r[2 * half + 1] * factor));
      }
    }
  }
}

// Copies rows [begin, end) of a warp's region of shared memory to memory, 16 bytes at a time.
// g_rows is the address of row 0, which itself need not be there.
template <class C>
__device__ __forceinline__ void store_rows(typename C::T* g_rows, const typename C::T* s_rows,
                                           int begin, int end) {
  sync_warp();  // put_rows of the other lanes has written the rows that this lane reads
  for (int i = lane_index(); i < (end - begin) * C::kVectors; i += 32) {
    const int row = begin + i / C::kVectors, e = i % C::kVectors * 8;
    store_16(g_rows + static_cast<int64_t>(row) * C::kE + e,
             load_16(s_rows + row * C::kStride + e));
  }
}

}  // namespace pelt::prefix_attention
