// The rows of gated_adapter on the CPU: their cut into tiles, statistics, dropout and gates.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/math.h"
#include "cpu/pages.h"
#include "ops/gated_adapter/cpu_parameters.h"

namespace pelt::gated_adapter {
namespace {

// ---- tiles ----

struct Tile {
  int64_t row;  // the first
  int64_t rows;
  int64_t padded;    // rows rounded up to a multiple of kRowUnit
  int64_t sentence;  // where weights differ between sentences; else 0
};

// Rows in tiles, which cross from one sentence to the next unless each has its own weights. They
// begin at multiples of a product's block, so that only a group's last block may be small.
struct Tiles {
  int64_t groups, group_rows, per_group;
  int64_t tile_rows;  // at most
  int64_t block_rows;

  int64_t count() const { return groups * per_group; }
  Tile at(int64_t i) const {
    const int64_t group = i / per_group, place = i % per_group;
    const int64_t begin = begin_of(place), rows = begin_of(place + 1) - begin;
    return {group * group_rows + begin, rows, round_up(rows, kRowUnit), group};
  }

 private:
  int64_t begin_of(int64_t place) const {
    const int64_t blocks = (group_rows + block_rows - 1) / block_rows;
    return std::min(blocks * place / per_group * block_rows, group_rows);
  }
};

// Into tiles of about so many rows, as many as go into each of `shares` equal shares of a group.
inline Tiles cut_by(const Call& call, int64_t tile_rows, int64_t shares) {
  const bool by_sentence = has_weights_per_sample(call);
  const int64_t groups = by_sentence ? call.B : 1, group_rows = rows_of(call) / groups;
  const int64_t block_rows = uses_pairs(call) ? kPairBlockRows : kBlockRows;
  const int64_t blocks = (group_rows + block_rows - 1) / block_rows;
  const int64_t of_share = (group_rows + shares * tile_rows / 2) / (shares * tile_rows);
  const int64_t tiles = std::min(shares * std::max<int64_t>(1, of_share), blocks);
  return {groups, group_rows, tiles, (blocks + tiles - 1) / tiles * block_rows, block_rows};
}

// Some 48 rows, so that a stretch of x and the sums stay in the second cache, and as many tiles as
// share the rows evenly. Only where no sum runs over the rows of a tile: it depends on the threads.
inline Tiles cut_evenly(const Call& call) {
  const bool by_sentence = has_weights_per_sample(call);
  const int64_t threads_of_group =
      by_sentence ? (call.threads + call.B - 1) / call.B : call.threads;
  return cut_by(call, 48, threads_of_group);
}

// ---- rows ----

// w . x in a vector of sums, with take(column, part, x) called for each vector of x. Four sums hide
// the latency of an addition.
template <class T, class Take>
inline Vector dots_of(const T* x, const float* w, int64_t columns, Take&& take) {
  Vector sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= columns; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t column = i + j * kWidth;
      const Vector value = load(x + column);
      take(column, value);
      sum[j] += value * load(w + column);
    }
  }
  for_vectors(columns - i, [&](int64_t j, auto part) {
    const Vector value = part.load_from(x + i + j);
    take(i + j, value);
    sum[0] += value * load(w + i + j);
  });
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
inline float dot_of(const T* x, const float* w, int64_t columns) {
  return sum_of(dots_of(x, w, columns, [](int64_t, Vector) {}));
}

struct Moments {
  float mean, rstd;  // rstd: 1 / sqrt(variance + eps)
};

// Of one row, in two passes: the deviations are squared, not the values.
template <class T>
inline Moments moments_of(const T* x, int64_t columns, float eps) {
  Vector sum = {};
  for_vectors(columns, [&](int64_t i, auto part) { sum += part.load_from(x + i); });
  const float mean = sum_of(sum) / static_cast<float>(columns);
  Vector squares = {};
  for (int64_t i = 0; i + kWidth <= columns; i += kWidth) {
    const Vector deviation = load(x + i) - mean;
    squares += deviation * deviation;
  }
  // One by one: the zeros behind the row's end deviate from the mean too.
  float rest = 0.0f;
  if (const int64_t tail = columns % kWidth) {
    const Vector last = load_part(x + columns - tail, tail);
    for (int64_t i = 0; i < tail; ++i) rest += (last[i] - mean) * (last[i] - mean);
  }
  const float variance = (sum_of(squares) + rest) / static_cast<float>(columns);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

// Multiplies `count` elements of a row, from `column` (a multiple of 4) on, by 0 or 1 / (1 - p).
inline void apply_dropout(const Call& call, int64_t row, int64_t column, int64_t count,
                          float* values) {
  for_dropout_factors(call.dropout, row, call.D, column, count,
                      [=](int64_t i, float factor) { values[i] *= factor; });
}

// ---- gates ----

// The gate of a row; 1 where there is none.
template <class T>
inline float gate_of(const Call& call, int64_t row) {
  if (has_learned_gate(call)) {
    return call.output_as<float>(kGateValue)[has_pooled_gate(call) ? row / call.S : row];
  }
  if (call.input[kGate] == nullptr) return 1.0f;
  return element_of<T>(call.parameter(kGate), has_gate_per_row(call) ? row : row / call.S);
}

// How much of a sentence's pooled gate each of its rows is; 0 for a row that does not count.
inline double share_of(const Call& call, int64_t row, int64_t counted) {
  if (call.pooling == Pooling::kToken) return 1.0;
  const bool counts = call.pooling == Pooling::kMean || call.input_as<bool>(kMask)[row];
  return counts ? 1.0 / static_cast<double>(std::max<int64_t>(counted, 1)) : 0.0;
}

// By how many rows a sentence's pooled gate is divided; may be 0.
inline int64_t counted_rows(const Call& call, int64_t sentence) {
  if (call.pooling != Pooling::kMaskedMean) return call.S;
  const bool* mask = call.input_as<bool>(kMask) + sentence * call.S;
  return std::count(mask, mask + call.S, true);
}

// gate_value from the gates [B * S] of the rows.
inline void pool_gates(const Call& call, const float* gates) {
  if (!has_pooled_gate(call)) {
    std::copy(gates, gates + rows_of(call), call.output_as<float>(kGateValue));
    return;
  }
  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t counted = counted_rows(call, b);
    double sum = 0.0;  // a row that does not count is not added, rather than times 0
    for (int64_t row = b * call.S; row < (b + 1) * call.S; ++row) {
      if (share_of(call, row, counted) != 0.0) sum += gates[row];
    }
    call.output_as<float>(kGateValue)[b] =
        static_cast<float>(sum / static_cast<double>(std::max<int64_t>(counted, 1)));
  }
}

}  // namespace
}  // namespace pelt::gated_adapter
