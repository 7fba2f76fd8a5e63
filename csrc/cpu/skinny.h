// Products of small matrices that are in cache, of any number of rows: what is left of a product
// when one of its sizes is a rank.
//
// Sums stay in registers, rows x vectors of them; rows are cut evenly, so that a rank of 8 is two
// blocks of 4 and not one of 6 and one of 2. Each sum runs over the whole depth in order.
#pragma once

#include "cpu/vector.h"

namespace pelt::cpu {
namespace {

// Of 16 registers, or of 32 with AVX-512 and NEON.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostSums = 24;
#else
constexpr int kMostSums = 12;
#endif
// A row of x, y or their gradients in float32, in stretches of columns that fit the first cache.
// Rows are an odd number of cache lines apart, or they would compete for a few of its lines.
constexpr int64_t kStretch = 256;
constexpr int64_t kStretchStride = kStretch + 16;

constexpr int64_t padded(int64_t columns) { return round_up(columns, kWidth); }

// The distance of rows with so many columns, for matrices of which columns are read.
constexpr int64_t row_distance(int64_t columns) {
  const int64_t width = padded(columns);
  return width % 32 == 0 ? width + kWidth : width;
}

// The left side of a product: element (row, k) is at row * row_stride + k * k_stride.
struct Left {
  const float* data;
  int64_t row_stride;
  int64_t k_stride;
};

// The right side: element (k, column) is at k * stride + column.
struct Right {
  const float* data;
  int64_t stride;
};

template <int kNumber>
struct Count {
  static constexpr int value = kNumber;
};

// visit(Count<number>{}) for a number from 1 to kMost.
template <int kMost, class Visit>
inline void with_count(int64_t number, Visit&& visit) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_count<kMost - 1>(number, visit);
  }
  visit(Count<kMost>{});
}

template <int kRows, int kVectors, class Finish>
inline __attribute__((always_inline)) void multiply_block(Left a, Right b, int64_t depth,
                                                          Finish&& finish) {
  Vector sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b.data + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector left = splat(a.data[r * a.row_stride]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
    a.data += a.k_stride;
    b.data += b.stride;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) finish(r, v * kWidth, sums[r][v]);
  }
}

// finish(row, column, sum) for each vector of A [rows, depth] B [depth, columns]; B is padded with
// anything finite to whole vectors.
template <class Finish>
inline void multiply_each_vector(int64_t rows, int64_t columns, int64_t depth, Left a, Right b,
                                 Finish&& finish) {
  auto run = [&](auto vectors, int64_t column) {
    constexpr int kVectors = decltype(vectors)::value;
    constexpr int kMost = kVectors == 2 ? kMostSums / 2 : 12;
    const int64_t blocks = (rows + kMost - 1) / kMost;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = rows * i / blocks, end = rows * (i + 1) / blocks;
      const Left from = {a.data + row * a.row_stride, a.row_stride, a.k_stride};
      with_count<kMost>(end - row, [&](auto count) {
        multiply_block<decltype(count)::value, kVectors>(
            from, {b.data + column, b.stride}, depth,
            [&](int64_t r, int64_t c, Vector sum) { finish(row + r, column + c, sum); });
      });
    }
  };
  int64_t column = 0;
  for (; column + kWidth < columns; column += 2 * kWidth) run(Count<2>{}, column);
  if (column < columns) run(Count<1>{}, column);
}

// C [rows, padded columns] = or += A B.
__attribute__((noinline)) inline void multiply_to(int64_t rows, int64_t columns, int64_t depth,
                                                  Left a, Right b, float* c, int64_t c_stride,
                                                  bool accumulate) {
  multiply_each_vector(rows, columns, depth, a, b, [&](int64_t row, int64_t column, Vector sum) {
    float* to = c + row * c_stride + column;
    store(to, accumulate ? load(to) + sum : sum);
  });
}

// Y [rows, columns] += A B, in Y's own type; nothing beside it is touched.
template <class T>
__attribute__((noinline)) inline void multiply_add_to(int64_t rows, int64_t columns, int64_t depth,
                                                      Left a, Right b, T* y, int64_t y_stride) {
  multiply_each_vector(rows, columns, depth, a, b, [&](int64_t row, int64_t column, Vector sum) {
    if (column >= columns) return;
    T* to = y + row * y_stride + column;
    if (column + kWidth <= columns) {
      store(to, load(to) + sum);
    } else {
      const Part part{columns - column};
      part.store_to(to, part.load_from(to) + sum);
    }
  });
}

}  // namespace
}  // namespace pelt::cpu
