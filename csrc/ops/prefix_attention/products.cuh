// The two products of attention, on fragments of one warp: rows by rows, which gives scores, and
// scores by rows, which accumulates outputs and gradients.
#pragma once

#include "cuda/device.cuh"
#include "cuda/mma_from.cuh"

namespace pelt::prefix_attention {

// What sums begin with that begin with nothing.
__device__ __forceinline__ FragmentD from_zero(int) { return {}; }

// d = start + a b^T over rows of kE elements; operand(m, step) gives a's [16, 16] from element
// 16 step on, both of them constants, and start(n) what the sums of fragments n begin with. b is at
// the address of load_b_pair. Each fragment of b that is loaded serves all kTilesM tiles of a.
template <class C, int kTilesM, int kTilesN, class Start, class Operand>
__device__ __forceinline__ void multiply_rows(FragmentD (&d)[kTilesM][kTilesN], Start&& start,
                                              Operand&& operand, uint32_t b_of_lane) {
  using T = typename C::T;
  for_constants<C::kE / 16>([&](auto step) {  // 16 elements of a row: the depth of one mma
    constexpr int kStep = decltype(step)::value;
    FragmentA a[kTilesM];
    for_constants<kTilesM>([&](auto m) { a[decltype(m)::value] = operand(m, step); });
    for_constants<kTilesN / 2>([&](auto pair) {
      constexpr int kPair = decltype(pair)::value;
      FragmentB b[2];
      load_b_pair_at<false, 16 * (kPair * C::kStride + kStep) * 2>(b, b_of_lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 2 * kPair + i;
        const FragmentD first = kStep == 0 ? start(n) : FragmentD{};
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          multiply_from<T>(d[m][n], a[m], b[i], kStep == 0 ? first : d[m][n]);
        }
      }
    });
  });
}

// Loads the operand [16, 16] of rows 16 m and following, from element 16 step on, of a tile whose
// first fragment is at the address of load_a.
template <class C, class M, class Step>
__device__ __forceinline__ FragmentA load_operand(uint32_t of_lane, M, Step) {
  return load_a_at<16 * (M::value * C::kStride + Step::value) * 2>(of_lane);
}

// Brings all operands of a warp's rows into registers.
template <class C, int kTilesM>
__device__ __forceinline__ void load_operands(FragmentA (&a)[kTilesM][C::kE / 16],
                                              uint32_t of_lane) {
  for_constants<kTilesM>([&](auto m) {
    for_constants<C::kE / 16>([&](auto step) {
      a[decltype(m)::value][decltype(step)::value] = load_operand<C>(of_lane, m, step);
    });
  });
}

// What multiply_rows asks for a left operand: each time from shared memory, or kept in registers.
template <class C>
__device__ __forceinline__ auto operands_at(uint32_t of_lane) {
  return [of_lane](auto m, auto step) { return load_operand<C>(of_lane, m, step); };
}

template <class C, bool kIsKept, class Kept>
__device__ __forceinline__ auto operands_of(const Kept& kept, uint32_t of_lane) {
  return [&kept, of_lane](auto m, auto step) -> FragmentA {
    if constexpr (kIsKept) {
      return kept[decltype(m)::value][decltype(step)::value];
    } else {
      return load_operand<C>(of_lane, m, step);
    }
  };
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
// ldmatrix transposes as it loads them, at the address of load_b_pair_transposed.
template <class C, int kTilesM, int kTilesN>
__device__ __forceinline__ void accumulate_rows(FragmentD (&d)[kTilesM][C::kE / 8],
                                                const FragmentD (&p)[kTilesM][kTilesN],
                                                uint32_t b_of_lane) {
  using T = typename C::T;
  for_constants<kTilesN / 2>([&](auto step) {  // 16 columns: two accumulators of p
    constexpr int kStep = decltype(step)::value;
    FragmentA a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) a[m] = as_operand<T>(p[m][2 * kStep], p[m][2 * kStep + 1]);
    for_constants<C::kE / 16>([&](auto pair) {  // one ldmatrix loads two fragments of 8 columns
      constexpr int kPair = decltype(pair)::value;
      FragmentB b[2];
      load_b_pair_at<true, 16 * (kStep * C::kStride + kPair) * 2>(b, b_of_lane);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply_from<T>(d[m][2 * kPair], a[m], b[0], d[m][2 * kPair]);
        multiply_from<T>(d[m][2 * kPair + 1], a[m], b[1], d[m][2 * kPair + 1]);
      }
    });
  });
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
