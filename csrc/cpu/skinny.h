// Products of small matrices that are in cache, of any number of rows: what is left of a product
// when one of its sizes is a rank.
//
// Sums stay in registers; rows are cut evenly, so that a rank of 8 is two blocks of 4 and not one
// of 6 and one of 2. There are two forms: one element of A feeds multiply-adds with vectors of B's
// columns, each sum running over the depth in order (multiply_to, multiply_add_to); or, where both
// sides lie along the depth and the result is narrow, vectors of both are multiplied and each sum
// is a vector until the end (multiply_dots).
#pragma once

#include <algorithm>

#include "cpu/vector.h"

namespace pelt::cpu {
namespace {

// How many sums stay in registers: there are 16 of them, or 32 with AVX-512 and NEON.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostSums = 24;
#else
constexpr int kMostSums = 12;
#endif
constexpr int kDotColumns = 4;
// A row of x, y or their gradients in float32, in stretches of columns that fit the first cache.
// Rows are an odd number of cache lines apart, or they would compete for a few of its lines.
constexpr int64_t kStretch = 256;
constexpr int64_t kStretchStride = kStretch + 16;
// The same for a row that is read where it lies and not copied.
constexpr int64_t kDotStretch = 512;

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

// The right side: element (k, column) is at k * stride + column; of multiply_dots (column, k).
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

// finish(sums) of one block of A B: each element of A is broadcast once and feeds kVectors
// multiply-adds.
template <int kRows, int kVectors, class Finish>
inline __attribute__((always_inline)) void multiply_block(Left a, Right b, int64_t depth,
                                                          Finish&& finish) {
  Sums<kRows, kVectors> sums;
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
  finish(sums);
}

// finish(row, column, sums) for each block of A [rows, depth] B [depth, columns]; B is padded with
// anything finite to whole vectors. A few rows go through a stretch of columns, so that what is
// added to lies in few and long pieces of memory and the stretch of B stays in the first cache.
template <class Finish>
inline void multiply_blocks(int64_t rows, int64_t columns, int64_t depth, Left a, Right b,
                            Finish&& finish) {
  auto run = [&](auto vectors, int64_t begin, int64_t end) {
    constexpr int kVectors = decltype(vectors)::value;
    constexpr int kMost = kVectors == 2 ? kMostSums / 2 : 12;
    const int64_t blocks = (rows + kMost - 1) / kMost;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = rows * i / blocks;
      const Left from = {a.data + row * a.row_stride, a.row_stride, a.k_stride};
      with_count<kMost>(rows * (i + 1) / blocks - row, [&](auto count) {
        for (int64_t column = begin; column < end; column += kVectors * kWidth) {
          multiply_block<decltype(count)::value, kVectors>(
              from, {b.data + column, b.stride}, depth,
              [&](auto& sums) { finish(row, column, sums); });
        }
      });
    }
  };
  const int64_t whole = padded(columns) / (2 * kWidth) * (2 * kWidth);
  for (int64_t column = 0; column < whole; column += kStretch) {
    run(Count<2>{}, column, std::min(column + kStretch, whole));
  }
  if (whole < columns) run(Count<1>{}, whole, columns);
}

// sums += and = a block of memory. All loads come before the first store: rows a multiple of 4 KB
// apart look like one address to the processor, and a load would wait for the store before it.
template <int kRows, int kVectors, class T>
inline __attribute__((always_inline)) void add_block(Sums<kRows, kVectors>& sums, const T* from,
                                                     int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] += load(from + r * stride + v * kWidth);
  }
}

// A block of memory = sums.
template <int kRows, int kVectors, class T>
inline __attribute__((always_inline)) void store_block(const Sums<kRows, kVectors>& sums, T* to,
                                                       int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(to + r * stride + v * kWidth, sums[r][v]);
  }
}

// Lane i of the result is the sum over the lanes of vector i. Each step folds two vectors into one.
inline Vector sums_of(Vector (&vectors)[kWidth]) {
  Ints lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) {
    const Ints is_high = (lane & step) != 0;
    const Ints first = is_high ? lane - step + kWidth : lane;
    const Ints second = is_high ? lane + kWidth : lane + step;
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) {
      const Vector low = vectors[i], high = vectors[i + step];
      vectors[i] = shuffle(low, high, first) + shuffle(low, high, second);
    }
  }
  return vectors[0];
}

// A block of multiply_dots: sums in vectors along the depth.
template <int kRows, int kColumns, class T>
__attribute__((noinline)) inline void multiply_dots_block(const T* x, int64_t x_stride,
                                                          const float* w, int64_t w_stride,
                                                          int64_t depth, float* c, int64_t c_stride,
                                                          bool accumulate) {
  constexpr int kSums = kRows * kColumns, kGroups = (kSums + kWidth - 1) / kWidth;
  Vector sums[kGroups * kWidth];
#pragma GCC unroll 32
  for (int i = 0; i < kGroups * kWidth; ++i) sums[i] = Vector{};
  for_vectors(depth, [&](int64_t k, auto part) {
    Vector left[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) left[r] = part.load_from(x + r * x_stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const Vector right = load(w + j * w_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r * kColumns + j] += left[r] * right;
    }
  });
  float totals[kGroups * kWidth];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    Vector group[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) group[i] = sums[g * kWidth + i];
    store(totals + g * kWidth, sums_of(group));
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      float& to = c[r * c_stride + j];
      to = accumulate ? to + totals[r * kColumns + j] : totals[r * kColumns + j];
    }
  }
}

// C [rows, columns] = or += X [rows, depth] W^T, where the rows of W [columns, depth] are padded
// with zeros to whole vectors: both are read along the depth, and neither is packed.
template <class T>
__attribute__((noinline)) inline void multiply_dots(int64_t rows, int64_t columns, int64_t depth,
                                                    const T* x, int64_t x_stride, Right w, float* c,
                                                    int64_t c_stride, bool accumulate) {
  constexpr int kRows = kMostSums / kDotColumns;
  const int64_t blocks = (columns + kDotColumns - 1) / kDotColumns;
  const int64_t narrow = columns / blocks, wide_blocks = columns % blocks;  // one wider than narrow
  using Block = void (*)(const T*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
  Block of[2][2] = {};  // whole and last rows, narrow and wide
  auto choose = [](int64_t height, int64_t width, Block& block) {
    with_count<kRows>(height, [&](auto r) {
      with_count<kDotColumns>(width, [&](auto j) {
        block = multiply_dots_block<decltype(r)::value, decltype(j)::value, T>;
      });
    });
  };
  const int64_t last = rows % kRows == 0 ? kRows : rows % kRows;
  for (int is_last = 0; is_last < 2; ++is_last) {
    choose(is_last ? last : kRows, narrow, of[is_last][0]);
    if (wide_blocks > 0) choose(is_last ? last : kRows, narrow + 1, of[is_last][1]);
  }
  auto run = [&](int64_t row, int64_t block) {
    const int64_t column = narrow * block + std::min(block, wide_blocks);
    of[row + kRows > rows][block < wide_blocks](x + row * x_stride, x_stride,
                                                w.data + column * w.stride, w.stride, depth,
                                                c + row * c_stride + column, c_stride, accumulate);
  };
  // The inner loop runs over what fits in the first cache: a few blocks of W, or else all rows of
  // X.
  constexpr int64_t kFewBlocks = 4;
  if (blocks <= kFewBlocks) {
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t block = 0; block < blocks; ++block) run(row, block);
    }
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = 0; row < rows; row += kRows) run(row, block);
    }
  }
}

// C [rows, padded columns] = or += A B.
__attribute__((noinline)) inline void multiply_to(int64_t rows, int64_t columns, int64_t depth,
                                                  Left a, Right b, float* c, int64_t c_stride,
                                                  bool accumulate) {
  multiply_blocks(rows, columns, depth, a, b, [&](int64_t row, int64_t column, auto& sums) {
    float* to = c + row * c_stride + column;
    if (accumulate) add_block(sums, to, c_stride);
    store_block(sums, to, c_stride);
  });
}

// Y [rows, columns] += A B, in Y's own type; nothing beside it is touched.
template <class T>
__attribute__((noinline)) inline void multiply_add_to(int64_t rows, int64_t columns, int64_t depth,
                                                      Left a, Right b, T* y, int64_t y_stride) {
  multiply_blocks(rows, columns, depth, a, b, [&](int64_t row, int64_t column, auto& sums) {
    constexpr int64_t kVectors = sizeof(sums[0]) / sizeof(Vector);
    constexpr int64_t kRows = sizeof(sums) / sizeof(sums[0]);
    T* to = y + row * y_stride + column;
    if (column + kVectors * kWidth <= columns) {
      add_block(sums, to, y_stride);
      store_block(sums, to, y_stride);
      return;
    }
    float
        values[kRows * kVectors * kWidth];  // the sums stay in registers where this is not reached
    store_block(sums, values, kVectors * kWidth);
    for (int64_t r = 0; r < kRows; ++r) {
      for_vectors(columns - column, [&](int64_t i, auto part) {
        T* at = to + r * y_stride + i;
        part.store_to(at, part.load_from(at) + load(values + r * kVectors * kWidth + i));
      });
    }
  });
}

}  // namespace
}  // namespace pelt::cpu
