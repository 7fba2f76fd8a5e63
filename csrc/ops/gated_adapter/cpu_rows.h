// What forward and backward of gated_adapter on the CPU have in common: the cut into tiles, memory,
// parameters as float32, gates, row statistics and dropout.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/math.h"
#include "cpu/pages.h"
#include "cpu/panels.h"
#include "cpu/philox_lanes.h"
#include "ops/gated_adapter/cpu.h"

namespace pelt::gated_adapter {
namespace {

using namespace pelt::cpu;

inline int64_t rows_of(const CpuCall& call) { return call.B * call.S; }
inline int64_t padded_width(const CpuCall& call) { return round_up(call.D, kWidth); }
inline int64_t padded_rank(const CpuCall& call) { return round_up(call.R, kWidth); }

// The distance between rows [R]: not a multiple of 128 bytes, or a column's elements would compete
// for a few lines of the first cache.
inline int64_t rank_stride(const CpuCall& call) {
  const int64_t rank = padded_rank(call);
  return rank % 32 == 0 ? rank + kWidth : rank;
}

inline bool has_learned_gate(const CpuCall& call) { return call.input[kGateWeight] != nullptr; }
inline bool has_pooled_gate(const CpuCall& call) {
  return has_learned_gate(call) && call.pooling != CpuPooling::kToken;
}
inline bool has_pre_norm(const CpuCall& call) { return call.input[kPreNormWeight] != nullptr; }
inline bool has_post_norm(const CpuCall& call) { return call.input[kPostNormWeight] != nullptr; }
inline bool has_dropout(const CpuCall& call) { return call.dropout_threshold != 0; }

// Hands out pieces of the workspace; without memory it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  float* floats(int64_t count) {
    used = round_up(used, 64);
    float* piece = base ? reinterpret_cast<float*>(base + used) : nullptr;
    used += count * static_cast<int64_t>(sizeof(float));
    return piece;
  }
};

// ---- parameters ----

// Calls visit(pointer) with the parameter's own element type.
template <class T, class Visit>
inline void with_parameter(const CpuCall& call, int which, Visit&& visit) {
  if (call.masters >> which & 1u) {
    visit(static_cast<const float*>(call.input[which]));
  } else {
    visit(static_cast<const T*>(call.input[which]));
  }
}

template <class T, class Visit>
inline void with_grad(const CpuCall& call, int which, Visit&& visit) {
  if (call.masters >> which & 1u) {
    visit(static_cast<float*>(call.grad[which]));
  } else {
    visit(static_cast<T*>(call.grad[which]));
  }
}

// [members, columns] as float32, rows padded with zeros; a missing parameter is all zeros.
template <class T>
inline void read_parameter(const CpuCall& call, int which, int64_t first_member, int64_t members,
                           int64_t columns, float* to) {
  const int64_t padded = round_up(columns, kWidth);
  if (call.input[which] == nullptr) {
    std::fill(to, to + members * padded, 0.0f);
    return;
  }
  with_parameter<T>(call, which, [&](const auto* from) {
    for (int64_t m = 0; m < members; ++m) {
      const auto* row = from + (first_member + m) * columns;
      for_vectors(columns, [&](int64_t i, auto part) {
        store(to + m * padded + i, part.load_from(row + i));
      });
    }
  });
}

template <class T>
inline float read_scalar(const CpuCall& call, int which, float otherwise) {
  float value = otherwise;
  if (call.input[which] != nullptr) {
    with_parameter<T>(call, which, [&](const auto* from) { value = load_part(from, 1)[0]; });
  }
  return value;
}

// The members of a bank that a call uses: slot 0 is the one of the batch, or slot i is member i.
struct Bank {
  int64_t first_member = 0;
  int64_t slots = 1;
  const int64_t* index = nullptr;  // [B], where each sentence has its own

  int64_t slot_of(int64_t sentence) const { return index ? index[sentence] : 0; }

  bool is_used(int64_t slot, int64_t sentences) const {
    if (index == nullptr) return true;
    for (int64_t b = 0; b < sentences; ++b) {
      if (index[b] == slot) return true;
    }
    return false;
  }
};

inline Bank make_bank(const void* index, bool is_per_sample, int64_t members) {
  const auto* values = static_cast<const int64_t*>(index);
  Bank bank;
  if (is_per_sample) {
    bank.slots = members;
    bank.index = values;
  } else if (values != nullptr) {
    bank.first_member = values[0];
  }
  return bank;
}

struct Parameters {
  Bank down, up;
  float* b_down = nullptr;  // [slots, padded rank]
  float* b_up = nullptr;    // [slots, padded width]
  float* pre_weight = nullptr;
  float* pre_bias = nullptr;
  float* post_weight = nullptr;
  float* post_bias = nullptr;
  float* gate_weight = nullptr;
  float gate_bias = 0.0f;
  float scale = 1.0f;  // scale_value times the learned scale

  void place(const CpuCall& call, Arena& arena) {
    const int64_t width = padded_width(call), rank = padded_rank(call);
    down = make_bank(call.input[kDownIndex], call.has_down_index_per_sample, call.M);
    up = make_bank(call.input[kUpIndex], call.has_up_index_per_sample, call.M_up);
    b_down = arena.floats(down.slots * rank);
    b_up = arena.floats(up.slots * width);
    pre_weight = arena.floats(has_pre_norm(call) ? width : 0);
    pre_bias = arena.floats(has_pre_norm(call) ? width : 0);
    post_weight = arena.floats(has_post_norm(call) ? width : 0);
    post_bias = arena.floats(has_post_norm(call) ? width : 0);
    gate_weight = arena.floats(has_learned_gate(call) ? width : 0);
  }

  template <class T>
  void read(const CpuCall& call) {
    read_parameter<T>(call, kBDown, down.first_member, down.slots, call.R, b_down);
    read_parameter<T>(call, kBUp, up.first_member, up.slots, call.D, b_up);
    if (has_pre_norm(call)) {
      read_parameter<T>(call, kPreNormWeight, 0, 1, call.D, pre_weight);
      read_parameter<T>(call, kPreNormBias, 0, 1, call.D, pre_bias);
    }
    if (has_post_norm(call)) {
      read_parameter<T>(call, kPostNormWeight, 0, 1, call.D, post_weight);
      read_parameter<T>(call, kPostNormBias, 0, 1, call.D, post_bias);
    }
    if (has_learned_gate(call)) {
      read_parameter<T>(call, kGateWeight, 0, 1, call.D, gate_weight);
      gate_bias = read_scalar<T>(call, kGateBias, 0.0f);
    }
    scale = call.scale_value * read_scalar<T>(call, kScale, 1.0f);
  }
};

// Weights as panels, [slots][panel_floats(depth, columns)], for a product with `columns` results.
struct Weights {
  int which = kWDown;
  bool is_transposed = false;  // W is [columns, depth]
  int64_t depth = 0, columns = 0;
  float* panels = nullptr;

  void place(Arena& arena, const Bank& bank) {
    panels = arena.floats(bank.slots * panel_floats(depth, columns));
  }
  const float* of(int64_t slot) const { return panels + slot * panel_floats(depth, columns); }
  int64_t panels_per_slot() const { return (columns + kPanel - 1) / kPanel; }

  template <class T>
  void pack(const CpuCall& call, const Bank& bank, int64_t task) const {
    const int64_t slot = task / panels_per_slot(), column = task % panels_per_slot() * kPanel;
    if (!bank.is_used(slot, call.B)) return;
    float* to = panels + slot * panel_floats(depth, columns);
    with_parameter<T>(call, which, [&](const auto* from) {
      const auto* w = from + (bank.first_member + slot) * depth * columns;
      if (is_transposed) {
        pack_panel_transposed(w, depth, columns, column, to);
      } else {
        pack_panel(w, depth, columns, column, to);
      }
    });
  }
};

// Small weights are packed before a second thread has woken up: some 5 us for 40 thousand numbers.
inline int pack_threads(const CpuCall& call) {
  return call.R * call.D < 1 << 17 ? 1 : call.threads;
}

// Zeros for the gradients of banks, whose other members no row reaches.
template <class T>
inline void clear_unused_members(const CpuCall& call) {
  const int64_t sizes[][3] = {{kWDown, call.M, call.R * call.D},
                              {kBDown, call.M, call.R},
                              {kWUp, call.M_up, call.R * call.D},
                              {kBUp, call.M_up, call.D}};
  for (const auto& [which, members, size] : sizes) {
    if (call.grad[which] == nullptr || members == 1) continue;
    with_grad<T>(call, static_cast<int>(which), [&](auto* grad) {
      std::memset(grad, 0, static_cast<size_t>(members * size) * sizeof *grad);
    });
  }
}

// ---- tiles ----

struct Tile {
  int64_t row;  // the first
  int64_t rows;
  int64_t padded;    // rows rounded up to a multiple of kRowUnit
  int64_t sentence;  // where weights differ between sentences; else 0
};

// Rows in tiles, which cross from one sentence to the next unless each has its own weights. They
// begin at multiples of kBlockRows, so that only a group's last block of a product may be small.
struct Tiles {
  int64_t groups, group_rows, per_group;
  int64_t tile_rows;  // at most

  int64_t count() const { return groups * per_group; }
  Tile at(int64_t i) const {
    const int64_t group = i / per_group, place = i % per_group;
    const int64_t begin = begin_of(place), rows = begin_of(place + 1) - begin;
    return {group * group_rows + begin, rows, round_up(rows, kRowUnit), group};
  }

 private:
  int64_t begin_of(int64_t place) const {
    const int64_t blocks = (group_rows + kBlockRows - 1) / kBlockRows;
    return std::min(blocks * place / per_group * kBlockRows, group_rows);
  }
};

// Into tiles of about so many rows, as many as go into each of `shares` equal shares of a group.
inline Tiles cut_by(const CpuCall& call, int64_t tile_rows, int64_t shares) {
  const bool by_sentence = call.has_down_index_per_sample || call.has_up_index_per_sample;
  const int64_t groups = by_sentence ? call.B : 1, group_rows = rows_of(call) / groups;
  const int64_t blocks = (group_rows + kBlockRows - 1) / kBlockRows;
  const int64_t of_share = (group_rows + shares * tile_rows / 2) / (shares * tile_rows);
  const int64_t tiles = std::min(shares * std::max<int64_t>(1, of_share), blocks);
  return {groups, group_rows, tiles, (blocks + tiles - 1) / tiles * kBlockRows};
}

// Some 48 rows, so that a stretch of x and the sums stay in the second cache, and as many tiles as
// share the rows evenly. Only where no sum runs over the rows of a tile: it depends on the threads.
inline Tiles cut_evenly(const CpuCall& call) {
  const bool by_sentence = call.has_down_index_per_sample || call.has_up_index_per_sample;
  const int64_t threads_of_group =
      by_sentence ? (call.threads + call.B - 1) / call.B : call.threads;
  return cut_by(call, 48, threads_of_group);
}

// ---- rows ----

// One for each row, not for each element: float64 costs nothing, and a sentence's sum of gates or
// of their gradients keeps its digits.
inline float sigmoid_of(float x) {
  return static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(x))));
}

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
  float mean, rstd;
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
  float rest = 0.0f;
  if (const int64_t tail = columns % kWidth) {
    const Vector last = load_part(x + columns - tail, tail);
    for (int64_t i = 0; i < tail; ++i) rest += (last[i] - mean) * (last[i] - mean);
  }
  const float variance = (sum_of(squares) + rest) / static_cast<float>(columns);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

// Multiplies `count` elements of a row, from `column` (a multiple of 4) on, by 0 or 1 / (1 - p).
inline void apply_dropout(const CpuCall& call, int64_t row, int64_t column, int64_t count,
                          float* values) {
  alignas(64) uint32_t words[4 * kPhiloxGroups];
  const int64_t group = row * ((call.D + 3) / 4) + column / 4;
  for (int64_t done = 0; done < count; done += 4 * kPhiloxGroups) {
    philox_words(static_cast<uint64_t>(group + done / 4), 0, call.seed, words);
    const int64_t here = std::min<int64_t>(4 * kPhiloxGroups, count - done);
    for (int64_t i = 0; i < here; ++i) {
      values[done + i] *= words[i] >= call.dropout_threshold ? call.dropout_scale : 0.0f;
    }
  }
}

// ---- gates ----

// The gate of a row; 1 where there is none.
template <class T>
inline float gate_of(const CpuCall& call, int64_t row) {
  if (has_learned_gate(call)) {
    return call.gate_value[has_pooled_gate(call) ? row / call.S : row];
  }
  if (call.input[kGate] == nullptr) return 1.0f;
  float value = 0.0f;
  const int64_t place = call.has_gate_per_row ? row : row / call.S;
  with_parameter<T>(call, kGate, [&](const auto* gate) { value = load_part(gate + place, 1)[0]; });
  return value;
}

// How much of a sentence's pooled gate each of its rows is; 0 for a row that does not count.
inline double share_of(const CpuCall& call, int64_t row, int64_t counted) {
  if (call.pooling == CpuPooling::kToken) return 1.0;
  const bool counts =
      call.pooling == CpuPooling::kMean || static_cast<const bool*>(call.input[kMask])[row];
  return counts ? 1.0 / static_cast<double>(std::max<int64_t>(counted, 1)) : 0.0;
}

inline int64_t counted_rows(const CpuCall& call, int64_t sentence) {
  if (call.pooling != CpuPooling::kMaskedMean) return call.S;
  const bool* mask = static_cast<const bool*>(call.input[kMask]) + sentence * call.S;
  return std::count(mask, mask + call.S, true);
}

// gate_value from the gates [B * S] of the rows.
inline void pool_gates(const CpuCall& call, const float* gates) {
  if (!has_pooled_gate(call)) {
    std::copy(gates, gates + rows_of(call), call.gate_value);
    return;
  }
  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t counted = counted_rows(call, b);
    double sum = 0.0;
    for (int64_t row = b * call.S; row < (b + 1) * call.S; ++row) {
      if (share_of(call, row, counted) != 0.0) sum += gates[row];
    }
    call.gate_value[b] =
        static_cast<float>(sum / static_cast<double>(std::max<int64_t>(counted, 1)));
  }
}

}  // namespace
}  // namespace pelt::gated_adapter
