// Products of bfloat16 matrices on tiles (cpu/tiles.h), whose sums are float32.
//
// A lies as it is, row-major. B is packed in pairs of rows and in panels of kPairColumns columns,
// padded with zeros to whole panels and to a multiple of kTileDepth rows:
//
//   panel: [pairs of k][kPairColumns][2]    A: [rows, k]    sums: [kPairBlockRows, kPairColumns]
//
// 16 rows of half a panel's width are a tile. A kernel asks kHasPairs first; without it nothing
// here is called. AVX-512's dot products of pairs could read the same panels, and do not: on an
// Emerald Rapids gated_adapter's forward took 1.5 times as long with them as with float32
// multiply-adds.
#pragma once

#include <algorithm>

#include "cpu/panels.h"
#include "cpu/tiles.h"

namespace pelt::cpu {
namespace {

#if defined(PELT_HAS_TILES)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

constexpr int64_t kPairColumns = 2 * kTileSide;
constexpr int64_t kPairBlockRows = 2 * kTileSide;
constexpr int kPairVectors = kPairColumns / kWidth;

constexpr int64_t pair_depth(int64_t depth) { return round_up(depth, kTileDepth); }

constexpr int64_t pair_columns(int64_t columns) { return round_up(columns, kPairColumns); }

// bfloat16 numbers in all the panels of B [depth, columns].
constexpr int64_t pair_numbers(int64_t depth, int64_t columns) {
  return pair_depth(depth) * pair_columns(columns);
}

// The distance between rows of an A that a kernel writes itself: whole tiles, and an odd number of
// cache lines, or the rows of a block would compete for a few lines of the first cache.
constexpr int64_t pair_distance(int64_t depth) {
  const int64_t width = pair_depth(depth);
  return width / kTileDepth % 2 == 0 ? width + kTileDepth : width;
}

// A [rows, depth].
struct PairRows {
  const bf16* data;
  int64_t stride;
};

// ---- packing ----

inline void store_words(bf16* to, Words words) { std::memcpy(to, &words, sizeof words); }

// The pairs of two rows [count], as 32-bit words: to [count, 2]; the second row may be missing.
inline void pack_pair(const bf16* first, const bf16* second, int64_t count, bf16* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Words low = load_halves(first + i);
    const Words high = second == nullptr ? Words{} : load_halves(second + i) << 16;
    store_words(to + 2 * i, low | high);
  }
  for (; i < count; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second == nullptr ? bf16{0} : second[i];
  }
}

// A row of any type as bfloat16; copied into `buffer` where it is float32.
inline const bf16* as_bf16(const bf16* row, int64_t, bf16*) { return row; }
inline const bf16* as_bf16(const float* row, int64_t count, bf16* buffer) {
  for_vectors(count,
              [&](int64_t i, auto part) { part.store_to(buffer + i, part.load_from(row + i)); });
  return buffer;
}

// One panel of B = W [depth, columns]: `count` columns, of which row(k) gives the first of row k.
// It is called for k in order, and one result has to live until the next but one.
template <class Row>
inline void pack_pair_panel(int64_t depth, int64_t count, bf16* panel, Row&& row) {
  bf16 buffer[2][kPairColumns];
  for (int64_t k = 0; k < pair_depth(depth); k += 2, panel += 2 * kPairColumns) {
    if (k >= depth || count < kPairColumns) {
      std::memset(panel, 0, static_cast<size_t>(2 * kPairColumns) * sizeof(bf16));
    }
    if (k >= depth) continue;
    const bf16* first = as_bf16(row(k), count, buffer[0]);
    const bf16* second = k + 1 < depth ? as_bf16(row(k + 1), count, buffer[1]) : nullptr;
    pack_pair(first, second, count, panel);
  }
}

// Reads `count` numbers of a row as words of two, with zeros behind them.
template <class T>
inline Vector load_pairs(const T* from, int64_t count) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == sizeof(bf16)) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return (Vector)_mm512_maskz_loadu_epi16(mask, from);
  }
#endif
  bf16 buffer[2 * kWidth] = {};
  for_vectors(count,
              [&](int64_t i, auto part) { part.store_to(buffer + i, part.load_from(from + i)); });
  Vector words;
  std::memcpy(&words, buffer, sizeof words);
  return words;
}

// One panel of B = the transpose of W [columns, depth]: `columns` rows of W, of which row(i) gives
// the i-th. A pair lies in one row of W, so that words are transposed.
template <class Row>
inline void pack_pair_panel_transposed(int64_t depth, int64_t columns, bf16* panel, Row&& row) {
  constexpr int64_t kHere = 2 * kWidth;  // numbers of a row that make a vector of words
  for (int64_t part = 0; part < kPairColumns; part += kWidth) {
    for (int64_t k = 0; k < pair_depth(depth); k += kHere) {
      Vector block[kWidth];
      const int64_t count = std::clamp<int64_t>(depth - k, 0, kHere);
      for (int64_t i = 0; i < kWidth; ++i) {
        block[i] = part + i < columns ? load_pairs(row(part + i) + k, count) : Vector{};
      }
      if (part < columns && count > 0) transpose(block);
      for (int64_t i = 0; i < kWidth; ++i) {
        std::memcpy(panel + (k / 2 + i) * 2 * kPairColumns + 2 * part, &block[i], sizeof block[i]);
      }
    }
  }
}

// ---- products ----

#if defined(PELT_HAS_TILES)

// A tile of A from (row, k), of which only `rows` rows and `depth` columns are there.
template <int kTile>
inline void load_pair_tile(const PairRows& a, int64_t row, int64_t k, int64_t rows, int64_t depth,
                           bf16* edge) {
  const bf16* from = a.data + row * a.stride + k;
  if (rows - row >= kTileSide && depth - k >= kTileDepth) {
    return tile_load<kTile>(from, a.stride * static_cast<int64_t>(sizeof(bf16)));
  }
  std::memset(edge, 0, static_cast<size_t>(kTileSide * kTileDepth) * sizeof(bf16));
  const int64_t here = std::clamp<int64_t>(rows - row, 0, kTileSide);
  const int64_t count = std::min(depth - k, kTileDepth);
  for (int64_t r = 0; r < here; ++r) {
    std::memcpy(edge + r * kTileDepth, from + r * a.stride,
                static_cast<size_t>(count) * sizeof(bf16));
  }
  tile_load<kTile>(edge, kTileDepth * static_cast<int64_t>(sizeof(bf16)));
}

// c [32, 32], whole, = or += the rows of A from `row` on times a panel, of which `columns` are more
// than zeros. Tiles 0 to 3 are sums, two by two, so that each tile of A and of B that is loaded is
// used twice.
inline void multiply_pair_tiles(const PairRows& a, int64_t row, int64_t rows, const bf16* panel,
                                int64_t depth, int64_t columns, float* c, int64_t stride,
                                bool accumulate) {
  alignas(64) bf16 edge[kTileSide * kTileDepth];
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  const bool is_high = rows - row > kTileSide;  // else the lower tiles have no row
  const bool is_wide = columns > kTileSide;     // else the right ones are not added to
  float* const corner[4] = {c, c + kTileSide, c + kTileSide * stride,
                            c + kTileSide * stride + kTileSide};
  if (!accumulate) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(corner[0], bytes), tile_load<1>(corner[1], bytes);
    if (is_high) tile_load<2>(corner[2], bytes), tile_load<3>(corner[3], bytes);
  }
  constexpr int64_t kPanelBytes = 2 * kPairColumns * static_cast<int64_t>(sizeof(bf16));
  for (int64_t k = 0; k < depth; k += kTileDepth, panel += kTileDepth * kPairColumns) {
    tile_load<6>(panel, kPanelBytes);
    if (is_wide) tile_load<7>(panel + 2 * kTileSide, kPanelBytes);
    load_pair_tile<4>(a, row, k, rows, depth, edge);
    tile_multiply<0, 4, 6>();
    if (is_wide) tile_multiply<1, 4, 7>();
    if (!is_high) continue;
    load_pair_tile<5>(a, row + kTileSide, k, rows, depth, edge);
    tile_multiply<2, 5, 6>();
    if (is_wide) tile_multiply<3, 5, 7>();
  }
  tile_store<0>(corner[0], bytes), tile_store<1>(corner[1], bytes);
  if (!is_high) return;
  tile_store<2>(corner[2], bytes), tile_store<3>(corner[3], bytes);
}

#endif

// finish(row, column, sums) for each block of A [rows, depth] B [depth, columns], in groups of rows
// for which all of B passes by. `sums` are vectors [rows of a block][vectors of a panel], which
// finish may change; they may reach beyond rows and columns.
template <class Finish>
inline void multiply_pairs_each(const PairRows& a, const bf16* panels, int64_t depth, int64_t rows,
                                int64_t columns, int64_t group, Finish&& finish) {
  const int64_t pitch = pair_depth(depth) * kPairColumns;
  for (int64_t first = 0; first < rows; first += group) {
    const int64_t end = std::min(first + group, rows);
    for (int64_t column = 0; column < columns; column += kPairColumns) {
      const bf16* panel = panels + column / kPairColumns * pitch;
#if defined(PELT_HAS_TILES)
      alignas(64) float block[kPairBlockRows * kPairColumns];
      constexpr int kRows = 4;
      for (int64_t row = first; row < end; row += kPairBlockRows) {
        multiply_pair_tiles(a, row, end, panel, depth, columns - column, block, kPairColumns,
                            false);
        for (int64_t r = 0; r < std::min(kPairBlockRows, end - row); r += kRows) {
          Sums<kRows, kPairVectors> sums;
          for_sums(sums, [&](int i, int j, Vector& sum) {
            sum = load(block + (r + i) * kPairColumns + j);
          });
          finish(row + r, column, sums);
        }
      }
#else
      (void)a, (void)panel, (void)finish, (void)end;
#endif
    }
  }
}

// How many blocks multiply_pairs_into computes, about.
constexpr int64_t pair_blocks_of(int64_t rows, int64_t columns) {
  return (rows + kPairBlockRows - 1) / kPairBlockRows * (pair_columns(columns) / kPairColumns);
}

// The panels of B, packed for `packed_depth` rows, of which the first `depth` are multiplied.
struct PairPanels {
  const bf16* data;
  int64_t packed_depth;
  int64_t depth;
};

// C [rows, columns] float32 = or += A B. C has room for whole tiles: rows for a multiple of
// kTileSide and columns for whole panels; what lies there beyond the result is anything.
inline void multiply_pairs_into(const PairRows& a, const PairPanels& b, int64_t rows,
                                int64_t columns, float* c, int64_t stride, bool accumulate,
                                Ahead ahead = {}) {
  const int64_t pitch = pair_depth(b.packed_depth) * kPairColumns;
  for (int64_t column = 0; column < columns; column += kPairColumns) {
    const bf16* panel = b.data + column / kPairColumns * pitch;
#if defined(PELT_HAS_TILES)
    for (int64_t row = 0; row < rows; row += kPairBlockRows) {
      ahead.step();
      multiply_pair_tiles(a, row, rows, panel, b.depth, columns - column, c + row * stride + column,
                          stride, accumulate);
    }
#else
    (void)a, (void)panel, (void)rows, (void)c, (void)stride, (void)accumulate, (void)ahead;
#endif
  }
}

inline void multiply_pairs_into(const PairRows& a, const bf16* panels, int64_t depth, int64_t rows,
                                int64_t columns, float* c, int64_t stride, bool accumulate,
                                Ahead ahead = {}) {
  multiply_pairs_into(a, {panels, depth, depth}, rows, columns, c, stride, accumulate, ahead);
}

}  // namespace
}  // namespace pelt::cpu
