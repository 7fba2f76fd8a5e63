// The products of prefix_attention on the CPU: of float32 rows with panels, or on tiles of bfloat16
// rows with pairs.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/pairs.h"
#include "cpu/panels.h"

namespace pelt::prefix_attention {
namespace {

using namespace pelt::cpu;

// float32 rows times panels.
struct FloatProducts {
  using Element = float;
  static constexpr int64_t kQueryRows = 24;  // whole blocks, and a multiple of kRowUnit

  // How far apart the rows of an operand are, and the columns of a result.
  static int64_t width(int64_t n) { return round_up(n, kWidth); }
  static int64_t columns(int64_t n) { return round_up(n, kWidth); }
  // A packed operand [depth, columns].
  static int64_t numbers(int64_t depth, int64_t columns) { return panel_floats(depth, columns); }

  // B = the transpose of rows [columns, depth].
  static void pack_transposed(const float* rows, int64_t stride, int64_t depth, int64_t columns,
                              float* to) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      pack_panel_transposed(rows, stride, depth, columns, column, to);
    }
  }

  // B = rows [depth, columns].
  static void pack(const float* rows, int64_t stride, int64_t depth, int64_t columns, float* to) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      pack_panel(rows, stride, depth, columns, column, to);
    }
  }

  // C [rows, columns] = or += A B, of B's `packed` rows the first `depth`. A has rows up to a
  // multiple of kRowUnit, C too.
  static void multiply(const float* a, int64_t stride, const float* b, int64_t packed,
                       int64_t depth, int64_t rows, int64_t columns, float* c, int64_t ldc,
                       bool accumulate) {
    multiply_into(a, stride, 1, {b, packed, 0, depth}, c, ldc, round_up(rows, kRowUnit),
                  round_up(columns, kWidth), accumulate);
  }
};

// bfloat16 rows times pairs, on tiles.
struct PairProducts {
  using Element = bf16;
  static constexpr int64_t kQueryRows = kPairBlockRows;

  static int64_t width(int64_t n) { return pair_distance(n); }
  static int64_t columns(int64_t n) { return pair_columns(n); }
  static int64_t numbers(int64_t depth, int64_t columns) { return pair_numbers(depth, columns); }

  static void pack_transposed(const bf16* rows, int64_t stride, int64_t depth, int64_t columns,
                              bf16* to) {
    for (int64_t column = 0; column < columns; column += kPairColumns) {
      pack_pair_panel_transposed(depth, std::min(kPairColumns, columns - column),
                                 to + column * pair_depth(depth),
                                 [&](int64_t i) { return rows + (column + i) * stride; });
    }
  }

  static void pack(const bf16* rows, int64_t stride, int64_t depth, int64_t columns, bf16* to) {
    for (int64_t column = 0; column < columns; column += kPairColumns) {
      pack_pair_panel(depth, std::min(kPairColumns, columns - column),
                      to + column * pair_depth(depth),
                      [&](int64_t k) { return rows + k * stride + column; });
    }
  }

  // C has room for whole blocks.
  static void multiply(const bf16* a, int64_t stride, const bf16* b, int64_t packed, int64_t depth,
                       int64_t rows, int64_t columns, float* c, int64_t ldc, bool accumulate) {
    multiply_pairs_into({a, stride}, {b, packed, depth}, rows, columns, c, ldc, accumulate);
  }
};

template <class T>
using ProductsOf =
    std::conditional_t<kHasPairs && std::is_same_v<T, bf16>, PairProducts, FloatProducts>;

}  // namespace
}  // namespace pelt::prefix_attention
