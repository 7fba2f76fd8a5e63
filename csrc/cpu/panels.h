// Products of a tall matrix with a skinny one, from packed panels.
//
// B of every product lies in panels: two vectors of columns wide, all its rows (k) in a stretch, so
// that the inner loop reads memory in order. kBlockRows x two vectors of sums stay in registers:
//
//        panel:        k -> [ vector | vector ]
//   A: kBlockRows x k  ->   sums[kBlockRows][2],  one broadcast feeds two multiply-adds
//
// Sums over k run in stretches of kDepth, which start from 0 and are added up in order: short
// chains of rounding errors, and bits that do not depend on how rows are cut into tiles.
#pragma once

#include <algorithm>

#include "cpu/vector.h"

namespace pelt::cpu {
namespace {

// Sums take 2 kBlockRows registers of 16, or of 32 with AVX-512 and NEON; what is left holds the
// panel's two vectors and the broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif
constexpr int kRowUnit = kBlockRows / 3;  // rows are padded to a multiple of it
constexpr int kPanel = 2 * kWidth;
constexpr int64_t kDepth = 256;  // of a stretch of k

constexpr int64_t panel_floats(int64_t depth, int64_t columns) {
  return depth * round_up(columns, kWidth);
}

// sums = A B over `depth`; A's element (row, k) is at row * row_stride + k * k_stride.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply(const float* a, int64_t row_stride,
                                                    int64_t k_stride, const float* panel,
                                                    int64_t depth, Sums<kRows, kVectors>& sums) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(panel + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector element = splat(a[r * row_stride]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += element * b[v];
    }
    a += k_stride;
    panel += kVectors * kWidth;
  }
}

// The size of a block of sums, as a value that a lambda can take.
template <int kRows, int kVectors>
struct BlockTag {
  static constexpr int rows = kRows;
  static constexpr int vectors = kVectors;
};

// Cuts `rows`, a multiple of kRowUnit, into blocks: visit(tag, first row).
template <int kVectors, class Visit>
inline void for_row_blocks(int64_t rows, Visit&& visit) {
  int64_t row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) visit(BlockTag<kBlockRows, kVectors>{}, row);
  if (rows - row >= 2 * kRowUnit) {
    visit(BlockTag<2 * kRowUnit, kVectors>{}, row);
    row += 2 * kRowUnit;
  }
  if (row < rows) visit(BlockTag<kRowUnit, kVectors>{}, row);
}

// visit(row, column, sum) for each vector of a block; what it changes stays in registers.
template <int kRows, int kVectors, class Visit>
inline __attribute__((always_inline)) void for_sums(Sums<kRows, kVectors>& sums, Visit&& visit) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) visit(r, v * kWidth, sums[r][v]);
  }
}

// to [rows, columns] = value(row, column, part, sum) for each vector of a block, which may reach
// beyond it. All loads come before the first store: where rows lie a multiple of 4 KB apart, a load
// would wait for a store that seems to go to the same address.
template <int kRows, int kVectors, class T, class Value>
inline __attribute__((always_inline)) void store_sums(Sums<kRows, kVectors>& sums, int64_t rows,
                                                      int64_t columns, T* to, int64_t stride,
                                                      Value&& value) {
  if (__builtin_expect(kRows <= rows && kVectors * kWidth <= columns, true)) {
    for_sums(sums, [&](int r, int i, Vector& sum) { sum = value(r, i, Whole{}, sum); });
    for_sums(sums, [&](int r, int i, Vector& sum) { store(to + r * stride + i, sum); });
    return;
  }
  Vector values[kRows][kVectors];  // a copy, so that the sums of the path above stay in registers
  for_sums(sums, [&](int r, int i, Vector& sum) { values[r][i / kWidth] = sum; });
  for (int64_t r = 0; r < std::min<int64_t>(kRows, rows); ++r) {
    for_vectors(std::min<int64_t>(kVectors * kWidth, columns), [&](int64_t i, auto part) {
      part.store_to(to + r * stride + i, value(r, i, part, values[r][i / kWidth]));
    });
  }
}

// A stretch of k of all the panels of B.
struct Panels {
  const float* data;
  int64_t pitch;  // rows of a whole panel
  int64_t begin;  // the stretch
  int64_t depth;
};

// Rows of memory that a later step reads, fetched a few lines at a time between the blocks of a
// product: a product keeps the arithmetic busy and the memory idle, packing does the opposite.
class Ahead {
 public:
  Ahead() = default;
  // `count` bytes of each of `rows` rows, in about `steps` steps.
  Ahead(const void* first, int64_t pitch, int64_t rows, int64_t count, int64_t steps)
      : row_(static_cast<const char*>(first)), pitch_(pitch), rows_(rows), count_(count) {
    lines_ = rows * ((count + kLine - 1) / kLine) / std::max<int64_t>(1, steps) + 1;
  }

  void step() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + done_);
      done_ += kLine;
      if (done_ >= count_) done_ = 0, row_ += pitch_, --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_ = nullptr;
  int64_t pitch_ = 0, rows_ = 0, count_ = 0, lines_ = 0, done_ = 0;
};

// How many blocks multiply_into computes.
constexpr int64_t blocks_of(int64_t rows, int64_t columns) {
  return (rows + kBlockRows - 1) / kBlockRows * ((columns + kPanel - 1) / kPanel);
}

// C [rows, columns] = or += A [rows, depth] B; columns a multiple of kWidth, rows of kRowUnit.
inline void multiply_into(const float* a, int64_t row_stride, int64_t k_stride, const Panels& b,
                          float* c, int64_t ldc, int64_t rows, int64_t columns, bool accumulate,
                          Ahead ahead = {}) {
  auto run = [&](auto tag, int64_t row, int64_t column, const float* panel) {
    ahead.step();
    constexpr int kRows = decltype(tag)::rows, kVectors = decltype(tag)::vectors;
    Sums<kRows, kVectors> sums;
    multiply<kRows, kVectors>(a + row * row_stride, row_stride, k_stride, panel, b.depth, sums);
    float* to = c + row * ldc + column;
    if (accumulate)
      for_sums(sums, [&](int r, int i, Vector& sum) { sum += load(to + r * ldc + i); });
    for_sums(sums, [&](int r, int i, Vector& sum) { store(to + r * ldc + i, sum); });
  };
  int64_t column = 0;
  for (; column + kPanel <= columns; column += kPanel) {
    const float* panel = b.data + column * b.pitch + b.begin * kPanel;
    for_row_blocks<2>(rows, [&](auto tag, int64_t row) { run(tag, row, column, panel); });
  }
  if (column < columns) {
    const float* panel = b.data + column * b.pitch + b.begin * kWidth;
    for_row_blocks<1>(rows, [&](auto tag, int64_t row) { run(tag, row, column, panel); });
  }
}

constexpr int64_t kEachRows = 2 * kBlockRows;

// The product A [rows, depth] B with `finish(row, column, sums)` called for each block of the
// result instead of storing it; it may change the sums. For a short depth: B passes by once for
// every kEachRows rows.
template <class Finish>
inline void multiply_each(const float* a, int64_t lda, const float* panels, int64_t depth,
                          int64_t rows, int64_t columns, Finish&& finish) {
  auto run = [&](auto tag, int64_t row, int64_t column) {
    constexpr int kRows = decltype(tag)::rows, kVectors = decltype(tag)::vectors;
    Sums<kRows, kVectors> sums;
    multiply<kRows, kVectors>(a + row * lda, lda, 1, panels + column * depth, depth, sums);
    finish(row, column, sums);
  };
  for (int64_t first = 0; first < rows; first += kEachRows) {
    const int64_t count = std::min(kEachRows, rows - first);
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel) {
      for_row_blocks<2>(count, [&](auto tag, int64_t row) { run(tag, first + row, column); });
    }
    if (column < columns) {
      for_row_blocks<1>(count, [&](auto tag, int64_t row) { run(tag, first + row, column); });
    }
  }
}

// ---- packing ----

// One panel of B = W [depth, columns], whose rows are `stride` apart: columns from `column` on,
// zeros past the last.
template <class T>
inline void pack_panel(const T* w, int64_t stride, int64_t depth, int64_t columns, int64_t column,
                       float* panels) {
  const int64_t width = std::min<int64_t>(kPanel, round_up(columns - column, kWidth));
  float* to = panels + column * depth;
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = w + k * stride + column;
    const int64_t count = std::min<int64_t>(width, columns - column);
    for_vectors(count, [&](int64_t i, auto part) { store(to + i, part.load_from(from + i)); });
    to += width;
  }
}

// One panel of B = the transpose of W [columns, depth], whose rows are `stride` apart.
template <class T>
inline void pack_panel_transposed(const T* w, int64_t stride, int64_t depth, int64_t columns,
                                  int64_t column, float* panels) {
  const int64_t width = std::min<int64_t>(kPanel, round_up(columns - column, kWidth));
  float* to = panels + column * depth;
  for (int64_t part = 0; part < width; part += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, columns - column - part);
    for_vectors(depth, [&](int64_t k, auto piece) {
      Vector block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        block[i] = i < count ? piece.load_from(w + (column + part + i) * stride + k) : Vector{};
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, depth - k); ++i) {
        store(to + (k + i) * width + part, block[i]);
      }
    });
  }
}

// Puts `count` numbers into panels of `rows` rows, as row r: value(i, part) is a vector of them.
template <class Value>
inline void put_row(int64_t r, int64_t rows, int64_t count, float* panels, Value&& value) {
  const int64_t whole = count / kPanel * kPanel;
  float* to = panels + r * kPanel;
  for (int64_t column = 0; column < whole; column += kPanel, to += rows * kPanel) {
    store(to, value(column, Whole{}));
    store(to + kWidth, value(column + kWidth, Whole{}));
  }
  const int64_t width = round_up(count - whole, kWidth);
  to = panels + whole * rows + r * width;
  for_vectors(count - whole, [&](int64_t i, auto part) { store(to + i, value(whole + i, part)); });
}

// to [columns, rows] = the transpose of G [rows, columns], rows `stride` and `to_stride` apart. G's
// rows hold whole vectors.
template <class T>
inline void store_transposed(const float* g, int64_t stride, int64_t rows, int64_t columns, T* to,
                             int64_t to_stride) {
  for (int64_t i = 0; i < columns; i += kWidth) {
    for_vectors(rows, [&](int64_t r, auto part) {
      Vector block[kWidth];
      for (int64_t k = 0; k < kWidth; ++k) {
        block[k] = r + k < rows ? load(g + (r + k) * stride + i) : Vector{};
      }
      transpose(block);
      for (int64_t k = 0; k < std::min<int64_t>(kWidth, columns - i); ++k) {
        part.store_to(to + (i + k) * to_stride + r, block[k]);
      }
    });
  }
}

// sums [columns] += weight [rows] times a panel [rows, columns]; four sums at a time hide the
// latency of an addition.
inline void add_weighted_rows(const float* panel, const float* weight, int64_t rows,
                              int64_t columns, float* sums) {
  for (int64_t column = 0; column < columns; column += kWidth) {
    Vector sum[4] = {};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      for (int j = 0; j < 4; ++j) {
        sum[j] += weight[r + j] * load(panel + (r + j) * columns + column);
      }
    }
    for (; r < rows; ++r) sum[0] += weight[r] * load(panel + r * columns + column);
    store(sums + column, load(sums + column) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

}  // namespace
}  // namespace pelt::cpu
