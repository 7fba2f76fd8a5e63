// Tiles of W and of its scores, made from the factors: what forward and backward share.
//
// A tile is a few rows by kColumns columns. W = w0 + beta u v and a b come as products of packed
// panels (cpu/panels.h) and are never stored for the whole matrix.
#pragma once

#include <algorithm>
#include <limits>

#include "common/parallel.h"
#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/panels.h"
#include "ops/masked_weight/contract.h"

namespace pelt::masked_weight {
namespace {

using namespace pelt::cpu;
using Call = NativeCall<Contract, int64_t>;

constexpr int64_t kColumns = 256;  // of a tile: its buffers stay in the first-level cache

// A factor, which comes as float32 whatever the matrix is.
inline const float* factor_of(const Call& in, Input i) { return in.input_as<float>(i); }

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// A factor [depth, Din] in panels, as the right side of products.
inline void pack_factor(const float* from, int64_t depth, const Call& in, float* panels) {
  parallel_for(panels_of(in.Din), in.threads,
               [&](int64_t i) { pack_panel(from, in.Din, depth, in.Din, i * kPanel, panels); });
}

// factor * from [count, depth], and rows of zeros behind: products take whole blocks of rows.
inline void scale_rows(const float* from, int64_t count, int64_t depth, float factor, int64_t rows,
                       float* to) {
  for (int64_t i = 0; i < count * depth; ++i) to[i] = factor * from[i];
  std::fill(to + count * depth, to + rows * depth, 0.0f);
}

// The vector at `column` of a row that ends at `end`; 0 past it.
template <class T>
inline Vector load_up_to(const T* row, int64_t column, int64_t end) {
  return column + kWidth <= end ? load(row + column) : load_part(row + column, end - column);
}

template <class T>
inline void store_up_to(T* row, int64_t column, int64_t end, Vector v) {
  if (column + kWidth <= end) {
    store(row + column, v);
  } else {
    store_part(row + column, v, end - column);
  }
}

// A rectangle of the matrix; `columns` is at most kColumns.
struct Area {
  int64_t row, rows;
  int64_t column, columns;
};

// visit(area) for the stretches of columns of some rows, from left to right.
template <class Visit>
inline void for_areas(const Call& in, int64_t row, int64_t rows, Visit&& visit) {
  for (int64_t column = 0; column < in.Din; column += kColumns) {
    visit(Area{row, rows, column, std::min(kColumns, in.Din - column)});
  }
}

// w [rows, kColumns] = w0 + (beta u) v. `u` holds the area's rows; those past the matrix are 0.
template <class T>
inline void update_weight(const Call& in, const Area& area, const float* u, const float* v,
                          float* w) {
  const int64_t stride = in.stride[kW0][0];
  const T* w0 = in.input_as<T>(kW0) + area.row * stride;
  multiply_each(u, in.R, v + area.column * in.R, in.R, round_up(area.rows, kRowUnit),
                round_up(area.columns, kWidth), [&](int64_t row, int64_t column, auto& sums) {
                  for_sums(sums, [&](int i, int j, Vector product) {
                    const int64_t r = row + i, c = column + j;
                    if (r >= area.rows) return;
                    const T* from = w0 + r * stride;
                    store(w + r * kColumns + c,
                          load_up_to(from, area.column + c, in.Din) + product);
                  });
                });
}

}  // namespace
}  // namespace pelt::masked_weight
