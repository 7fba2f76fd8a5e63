// The two products of attention, on fragments of one warp: rows by rows, which gives scores, and
// scores by rows, which accumulates outputs and gradients.
#pragma once

#include "cuda/device.cuh"

namespace pelt::prefix_attention {

// d += a b^T over rows of kE elements; operand(m, step) gives a's [16, 16] at step kk = 16 step.
template <class C, int kTilesM, int kTilesN, class Operand>
__device__ __forceinline__ void multiply_rows(FragmentD (&d)[kTilesM][kTilesN], Operand&& operand,
                                              const typename C::T* s_b) {
  using T = typename C::T;
#pragma unroll
  for (int step = 0; step < C::kE / 16; ++step) {
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

// Two neighbouring accumulators [16, 8] as the operand [16, 16] of the next product.
template <class T>
__device__ __forceinline__ FragmentA as_operand(const FragmentD& left, const FragmentD& right) {
  return {{pack<T>(left.r[0], left.r[1]), pack<T>(left.r[2], left.r[3]),
           pack<T>(right.r[0], right.r[1]), pack<T>(right.r[2], right.r[3])}};
}

// d += p b, p as the accumulators of an earlier product, b rows of kE elements.
template <class C, int kTilesM, int kTilesN>
__device__ __forceinline__ void accumulate_rows(FragmentD (&d)[kTilesM][C::kE / 8],
                                                const FragmentD (&p)[kTilesM][kTilesN],
                                                const typename C::T* s_b) {
  using T = typename C::T;
#pragma unroll
  for (int step = 0; step < kTilesN / 2; ++step) {
    FragmentA a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) a[m] = as_operand<T>(p[m][2 * step], p[m][2 * step + 1]);
#pragma unroll
    for (int n = 0; n < C::kE / 8; n += 2) {
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
// it holds: four lanes share 16 bytes, and what else comes with them is needed next.
template <class C, int kTilesM>
__device__ __forceinline__ void add_rows(FragmentD (&d)[kTilesM][C::kE / 8],
                                         const typename C::T* g_rows, int64_t stride, int count) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + FragmentD::row(2 * half);
      if (row >= count) continue;
      const typename C::T* from = g_rows + row * stride + FragmentD::column(0);
#pragma unroll
      for (int n = 0; n < C::kE / 8; ++n) {
        const Float2 pair = unpack<typename C::T>(load_4(from + 8 * n));
        d[m][n].r[2 * half] += pair.low;
        d[m][n].r[2 * half + 1] += pair.high;
      }
    }
  }
}

// A warp's accumulators times a factor, as 16-bit rows in its own part of shared memory.
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

// Writes rows [begin, end) of a warp's part of shared memory to memory, 16 bytes at a time.
// g_rows belongs to row 0, which itself need not be there.
template <class C>
__device__ __forceinline__ void store_rows(typename C::T* g_rows, const typename C::T* s_rows,
                                           int begin, int end) {
  sync_warp();
  for (int i = lane_index(); i < (end - begin) * C::kVectors; i += 32) {
    const int row = begin + i / C::kVectors, e = i % C::kVectors * 8;
    store_16(g_rows + static_cast<int64_t>(row) * C::kE + e,
             load_16(s_rows + row * C::kStride + e));
  }
}

}  // namespace pelt::prefix_attention
