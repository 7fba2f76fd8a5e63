// What forward and backward of lora_linear on the CPU have in common: the columns that are products
// with x, the cut into tiles of rows, gates and dropout.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/pairs.h"
#include "cpu/rows.h"
#include "cpu/skinny.h"
#include "ops/lora_linear/linear.h"

namespace pelt::lora_linear {
namespace {

using namespace pelt::cpu;

constexpr int kMaxBranches = 16;
constexpr int kMaxGates = 32;  // learned ones

using Call = NativeCall<Contract, int64_t>;
using Linear = BasicLinear<int64_t, kMaxBranches, kMaxGates, IsaTag<Isa::PELT_CPU_ISA>>;
using Branch = Linear::Branch;
using Gate = Linear::Gate;

inline int64_t rows_of(const Linear& call) { return call.B * call.S; }
inline bool has_dropout(const Linear& call) { return call.dropout.is_active(); }

// Whether products take bfloat16 as it is, on tiles.
inline bool uses_pairs(const Linear& call) { return kHasPairs && call.dtype == DType::kBF16; }

// to [columns padded] = a row in float32.
template <class T>
inline void read_row(const T* from, int64_t columns, float* to) {
  for_vectors(columns, [&](int64_t i, auto part) { store(to + i, part.load_from(from + i)); });
}

inline Bank a_bank(const Branch& branch) {
  return make_bank(branch.a_index, branch.has_a_index_per_sample, branch.M);
}
inline Bank b_bank(const Branch& branch) {
  return make_bank(branch.b_index, branch.has_b_index_per_sample, branch.N);
}

// ---- columns: what x is multiplied by ----

// Columns that are computed together: A's rows of one branch, or the learned gates' weights; all of
// them, where all see the same x and no sentence has its own.
struct Group {
  int first_branch = 0;  // the branches whose rows it holds
  int end_branch = 0;
  bool has_gates = false;  // and the gates behind them
  bool is_dropped = false;
  int64_t place = 0;  // its first column
  int64_t count = 0;
  int64_t slots = 1;
};

// On tiles a gate has two columns: its weight's bfloat16 value, and what that leaves out.
struct Columns {
  Group group[kMaxBranches + 1];
  int groups = 0;
  int64_t of_branch[kMaxBranches] = {};
  int64_t of_gates = 0;
  int64_t gate_width;  // columns of a gate
  int64_t unit;        // at multiples of which groups begin
  int64_t stride = 0;  // of a row of all columns

  explicit Columns(const Linear& call)
      : gate_width(uses_pairs(call) ? 2 : 1), unit(uses_pairs(call) ? kPairColumns : kWidth) {
    // One group for all: one product, and x is read once for everything.
    bool is_one = !has_dropout(call);
    for (int i = 0; i < call.branches; ++i) is_one &= !call.branch[i].has_a_index_per_sample;
    int64_t place = 0;
    for (int i = 0; i < call.branches; ++i) {
      if (!is_one || i == 0) open(place, i, call);
      of_branch[i] = place;
      place += call.branch[i].R;
      close(place, i + 1);
    }
    if (call.gates > 0) {
      if (!is_one || call.branches == 0) open(place, call.branches, call);
      of_gates = place;
      place += call.gates * gate_width;
      group[groups - 1].has_gates = true;
      if (!is_one) group[groups - 1].is_dropped = false;
      close(place, call.branches);
    }
    place = std::max<int64_t>(place, 1);
    stride = uses_pairs(call) ? pair_distance(place) : row_distance(place);
  }

 private:
  // A group begins where whole vectors, or panels of a tile product, do.
  void open(int64_t& place, int branch, const Linear& call) {
    place = round_up(place, unit);
    Group& g = group[groups++];
    g.first_branch = g.end_branch = branch;
    g.place = place;
    g.is_dropped = has_dropout(call);
    if (branch < call.branches) g.slots = a_bank(call.branch[branch]).slots;
  }
  void close(int64_t place, int end_branch) {
    group[groups - 1].count = place - group[groups - 1].place;
    group[groups - 1].end_branch = end_branch;
  }
};

// ---- tiles ----

struct Tile {
  int64_t row;  // the first
  int64_t rows;
  int64_t sentence;  // where factors differ between sentences; else 0
};

// Rows in tiles, which cross from one sentence to the next unless each has its own factors. The cut
// does not depend on the threads. A few rows of x stay in the first cache; where the factors are
// too large for the second one, more rows share each pass over them.
struct Tiles {
  int64_t tile_rows = 24;  // a multiple of the rows of a block of sums
  int64_t groups = 1, group_rows = 0, per_group = 0;

  explicit Tiles(const Linear& call) {
    if (call.ranks >= 32) tile_rows = 48;
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      if (branch.has_a_index_per_sample || branch.has_b_index_per_sample) groups = call.B;
    }
    group_rows = rows_of(call) / groups;
    // A product on tiles takes so many rows at a time; for fewer there is no more memory than that.
    if (uses_pairs(call)) {
      tile_rows = std::min(2 * kPairBlockRows, round_up(group_rows, kPairBlockRows));
    }
    per_group = (group_rows + tile_rows - 1) / tile_rows;
  }
  int64_t count() const { return groups * per_group; }
  Tile at(int64_t i) const {
    const int64_t group = i / per_group, begin = i % per_group * tile_rows;
    return {group * group_rows + begin, std::min(tile_rows, group_rows - begin), group};
  }
};

// Columns [begin, begin + count) of a tile's rows -> [rows, kStretchStride] in float32.
template <class T>
inline void read_stretch(const void* from, int64_t width, const Tile& tile, int64_t begin,
                         int64_t count, float* to) {
  const T* row = static_cast<const T*>(from) + tile.row * width + begin;
  for (int64_t r = 0; r < tile.rows; ++r) read_row(row + r * width, count, to + r * kStretchStride);
}

// The same columns as the right side of a product: where they lie, if they are whole vectors in
// float32, else in `memory`.
template <class T>
inline Right stretch_of(const void* from, int64_t width, const Tile& tile, int64_t begin,
                        int64_t count, float* memory) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (count % kWidth == 0) {
      return {static_cast<const float*>(from) + tile.row * width + begin, width};
    }
  }
  read_stretch<T>(from, width, tile, begin, count, memory);
  return {memory, kStretchStride};
}

// What dropout multiplies a stretch of a row of x by: 0 or 1 / (1 - p); `begin` is a multiple of 4.
inline void read_dropout_row(const Linear& call, int64_t row, int64_t begin, int64_t count,
                             float* to) {
  for_dropout_factors(call.dropout, row, call.Din, begin, padded(count),
                      [=](int64_t i, float factor) { to[i] = factor; });
}

inline void read_dropout(const Linear& call, const Tile& tile, int64_t begin, int64_t count,
                         float* to) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    read_dropout_row(call, tile.row + r, begin, count, to + r * kStretchStride);
  }
}

// values *= factor, element by element; both are stretches of a tile's rows.
inline void multiply_stretch(const Tile& tile, int64_t count, const float* factor, float* values) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t i = r * kStretchStride; i < r * kStretchStride + count; i += kWidth) {
      store(values + i, load(values + i) * load(factor + i));
    }
  }
}

// ---- gates ----

// Four sums at a time, so that an addition need not wait for the one before.
template <class T, class W>
inline float dot_of(const T* x, const W* w, int64_t columns) {
  Vector sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= columns; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) sum[k] += load(x + i + k * kWidth) * load(w + i + k * kWidth);
  }
  for (; i + kWidth <= columns; i += kWidth) sum[0] += load(x + i) * load(w + i);
  if (i < columns) sum[1] += load_part(x + i, columns - i) * load_part(w + i, columns - i);
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

inline bool is_pooled(const Gate& gate) { return gate.pooling != Pooling::kToken; }

// What a branch's rows are multiplied by: scale times the gate, 1 where there is none.
template <class T>
inline float factor_of(const Linear& call, const Branch& branch, int64_t row) {
  if (branch.learned_gate >= 0) {
    const Gate& gate = call.gate[branch.learned_gate];
    return branch.scale * gate.value[is_pooled(gate) ? row / call.S : row];
  }
  if (branch.gate.data == nullptr) return branch.scale;
  return branch.scale * element_of<T>(branch.gate, branch.has_gate_per_row ? row : row / call.S);
}

// [rows, stride]: scale g s of a branch, whose ranks begin at column `first` of s.
template <class T>
inline void read_scaled(const Linear& call, const Branch& branch, const Tile& tile, int64_t first,
                        int64_t ranks, float* to, int64_t stride) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* s = static_cast<const T*>(call.s) + (tile.row + r) * ranks + first;
    const float factor = factor_of<T>(call, branch, tile.row + r);
    for_vectors(branch.R, [&](int64_t i, auto part) {
      store(to + r * stride + i, factor * part.load_from(s + i));
    });
  }
}

// Does a row count in its sentence's gate.
inline bool counts(const Linear& call, const Gate& gate, int64_t row) {
  return gate.pooling != Pooling::kMaskedMean || call.mask[row];
}

// By how many rows a sentence's sum of gates is divided; 1 where gates are not pooled.
inline double divisor_of(const Linear& call, const Gate& gate, int64_t sentence) {
  if (gate.pooling == Pooling::kToken) return 1.0;
  if (gate.pooling == Pooling::kMean) return static_cast<double>(call.S);
  const bool* mask = call.mask + sentence * call.S;
  return static_cast<double>(std::max<int64_t>(std::count(mask, mask + call.S, true), 1));
}

}  // namespace
}  // namespace pelt::lora_linear
