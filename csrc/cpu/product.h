// A product of small row-major matrices that are in cache already and need no packing.
#pragma once

#include "cpu/vector.h"

namespace pelt::cpu {
namespace {

constexpr int kTileColumns = 2 * kWidth;  // columns are padded to a multiple of this
constexpr int kTileRows = 6;              // 12 sums and 3 operands fit 16 registers

// A of a product: element (row, k) is at row * row_stride + k * k_stride, so it may be transposed.
struct Operand {
  const float* data;
  int64_t row_stride;
  int64_t k_stride;
};

template <int kRows>
inline void multiply_tile(Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t depth, bool accumulate) {
  Vector sum[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 2; ++i) {
      sum[r][i] = accumulate ? load(c + r * ldc + i * kWidth) : Vector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector b0 = load(b + k * ldb), b1 = load(b + k * ldb + kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vector element = splat(a.data[r * a.row_stride + k * a.k_stride]);
      sum[r][0] += element * b0;
      sum[r][1] += element * b1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 2; ++i) store(c + r * ldc + i * kWidth, sum[r][i]);
  }
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns a multiple of kTileColumns.
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b,
                     int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Operand at = {a.data + i * a.row_stride, a.row_stride, a.k_stride};
      float* to = c + i * ldc + j;
      switch (rows - i) {
        case 1:
          multiply_tile<1>(at, b + j, ldb, to, ldc, depth, accumulate);
          break;
        case 2:
          multiply_tile<2>(at, b + j, ldb, to, ldc, depth, accumulate);
          break;
        case 3:
          multiply_tile<3>(at, b + j, ldb, to, ldc, depth, accumulate);
          break;
        case 4:
          multiply_tile<4>(at, b + j, ldb, to, ldc, depth, accumulate);
          break;
        case 5:
          multiply_tile<5>(at, b + j, ldb, to, ldc, depth, accumulate);
          break;
        default:
          multiply_tile<kTileRows>(at, b + j, ldb, to, ldc, depth, accumulate);
      }
    }
  }
}

}  // namespace
}  // namespace pelt::cpu
