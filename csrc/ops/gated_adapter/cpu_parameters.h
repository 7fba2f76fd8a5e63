// A call of gated_adapter on the CPU: its options, and its parameters as the kernels read them.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "cpu/pairs.h"
#include "cpu/panels.h"
#include "cpu/rows.h"
#include "ops/gated_adapter/call.h"

namespace pelt::gated_adapter {
namespace {

using namespace pelt::cpu;

using Call = CallOf<int64_t>;

inline int64_t padded_width(const Call& call) { return round_up(call.D, kWidth); }
inline int64_t padded_rank(const Call& call) { return round_up(call.R, kWidth); }

// The distance between rows [R]: not a multiple of 128 bytes, or a column's elements would compete
// for a few lines of the first cache.
inline int64_t rank_stride(const Call& call) {
  const int64_t rank = padded_rank(call);
  return rank % 32 == 0 ? rank + kWidth : rank;
}

inline bool has_dropout(const Call& call) { return call.dropout.is_active(); }

// Whether products take bfloat16 as it is, on tiles.
inline bool uses_pairs(const Call& call) { return kHasPairs && call.dtype == DType::kBF16; }

// ---- parameters ----

// [members, columns] as float32, rows padded with zeros; a missing parameter is all zeros.
template <class T>
inline void read_parameter(const Call& call, int which, int64_t first_member, int64_t members,
                           int64_t columns, float* to) {
  const int64_t padded = round_up(columns, kWidth);
  if (call.input[which] == nullptr) {
    std::fill(to, to + members * padded, 0.0f);
    return;
  }
  with_elements<T>(call.parameter(which), [&](const auto* from) {
    for (int64_t m = 0; m < members; ++m) {
      const auto* row = from + (first_member + m) * columns;
      for_vectors(columns, [&](int64_t i, auto part) {
        store(to + m * padded + i, part.load_from(row + i));
      });
    }
  });
}

// Weight and bias of a LayerNorm for all rows, or of one for each slot of a bank.
struct Norms {
  float* weight = nullptr;  // [slots, padded width]
  float* bias = nullptr;
  int64_t stride = 0;  // from slot to slot; 0: all have the same

  void place(Arena& arena, const Call& call, const Bank& bank, bool is_bank) {
    const int64_t width = padded_width(call);
    weight = arena.take((is_bank ? bank.slots : 1) * width);
    bias = arena.take((is_bank ? bank.slots : 1) * width);
    stride = is_bank ? width : 0;
  }

  template <class T>
  void read(const Call& call, const Bank& bank, bool is_bank, int which_weight, int which_bias) {
    const int64_t first = is_bank ? bank.first_member() : 0, count = is_bank ? bank.slots : 1;
    read_parameter<T>(call, which_weight, first, count, call.D, weight);
    read_parameter<T>(call, which_bias, first, count, call.D, bias);
  }

  const float* weight_of(int64_t slot) const { return weight + slot * stride; }
  const float* bias_of(int64_t slot) const { return bias + slot * stride; }
};

// What is added or multiplied element by element, converted to float32 once for each call; rows
// are padded, so that vectors are read whole.
struct Parameters {
  Bank down, up;
  float* b_down = nullptr;  // [slots, padded rank]
  float* b_up = nullptr;    // [slots, padded width]
  Norms pre_norm, post_norm;
  float* gate_weight = nullptr;  // [padded width]
  float gate_bias = 0.0f;
  float scale = 1.0f;  // scale_value times the learned scale

  // Reads no tensor: also where a call only asks how much memory it needs.
  void place(const Call& call, Arena& arena) {
    const int64_t width = padded_width(call), rank = padded_rank(call);
    down = make_bank(call.input_as<int64_t>(kDownIndex), has_down_index_per_sample(call), call.M);
    up = make_bank(call.input_as<int64_t>(kUpIndex), has_up_index_per_sample(call), call.M_up);
    b_down = arena.take(down.slots * rank);
    b_up = arena.take(up.slots * width);
    if (has_pre_norm(call)) pre_norm.place(arena, call, down, has_pre_norm_bank(call));
    if (has_post_norm(call)) post_norm.place(arena, call, up, has_post_norm_bank(call));
    gate_weight = arena.take(has_learned_gate(call) ? width : 0);
  }

  template <class T>
  void read(const Call& call) {
    read_parameter<T>(call, kBDown, down.first_member(), down.slots, call.R, b_down);
    read_parameter<T>(call, kBUp, up.first_member(), up.slots, call.D, b_up);
    if (has_pre_norm(call)) {
      pre_norm.read<T>(call, down, has_pre_norm_bank(call), kPreNormWeight, kPreNormBias);
    }
    if (has_post_norm(call)) {
      post_norm.read<T>(call, up, has_post_norm_bank(call), kPostNormWeight, kPostNormBias);
    }
    if (has_learned_gate(call)) {
      read_parameter<T>(call, kGateWeight, 0, 1, call.D, gate_weight);
      gate_bias = element_of<T>(call.parameter(kGateBias), 0);
    }
    const bool has_scale = call.input[kScale] != nullptr;
    scale = call.scale_value * (has_scale ? element_of<T>(call.parameter(kScale), 0) : 1.0f);
  }
};

// Weights as panels of float32, or of pairs of bfloat16, for a product with `columns` results.
struct Weights {
  int which = kWDown;
  bool is_transposed = false;  // W is [columns, depth]
  int64_t depth = 0, columns = 0;
  float* panels = nullptr;  // [slots][panel_floats(depth, columns)]
  bf16* pairs = nullptr;    // [slots][pair_numbers(depth, columns)], in the place of those

  // All members that the call may use; those that no sentence uses stay unpacked.
  void place(Arena& arena, const Bank& bank, bool as_pairs) {
    if (as_pairs) {
      pairs = arena.take<bf16>(bank.slots * pair_numbers(depth, columns));
    } else {
      panels = arena.take(bank.slots * panel_floats(depth, columns));
    }
  }
  const float* of(int64_t slot) const { return panels + slot * panel_floats(depth, columns); }
  const bf16* pairs_of(int64_t slot) const { return pairs + slot * pair_numbers(depth, columns); }

  // Results that a panel is for, and tasks of packing.
  static constexpr int64_t panel_columns(bool as_pairs) { return as_pairs ? kPairColumns : kPanel; }
  int64_t panels_per_slot(bool as_pairs) const {
    return (columns + panel_columns(as_pairs) - 1) / panel_columns(as_pairs);
  }

  // A task is one panel of one slot: tasks write apart from each other.
  template <class T>
  void pack(const Call& call, const Bank& bank, int64_t task) const {
    const bool as_pairs = uses_pairs(call);
    const int64_t per_slot = panels_per_slot(as_pairs), slot = task / per_slot;
    const int64_t column = task % per_slot * panel_columns(as_pairs);
    if (!bank.is_used(slot, call.B)) return;
    with_elements<T>(call.parameter(which), [&](const auto* from) {
      const auto* w = from + (bank.first_member() + slot) * depth * columns;
      // A product reads a panel from front to back, whichever way the weight lies.
      if (as_pairs) return pack_pairs(w, slot, column);
      float* to = panels + slot * panel_floats(depth, columns);
      if (is_transposed) {
        pack_panel_transposed(w, depth, depth, columns, column, to);
      } else {
        pack_panel(w, columns, depth, columns, column, to);
      }
    });
  }

 private:
  // Weights in float32 are rounded to bfloat16 on the way.
  template <class W>
  void pack_pairs(const W* w, int64_t slot, int64_t column) const {
    bf16* panel = pairs + slot * pair_numbers(depth, columns) + column * pair_depth(depth);
    if (is_transposed) {
      pack_pair_panel_transposed(depth, std::min(kPairColumns, columns - column), panel,
                                 [&](int64_t i) { return w + (column + i) * depth; });
    } else {
      pack_pair_panel(depth, std::min(kPairColumns, columns - column), panel,
                      [&](int64_t k) { return w + k * columns + column; });
    }
  }
};

// Small weights are packed before a second thread has woken up: some 5 us for 40 thousand numbers.
inline int pack_threads(const Call& call) { return call.R * call.D < 1 << 17 ? 1 : call.threads; }

// Zeros for the gradients of banks, whose other members no row reaches.
template <class T>
inline void clear_unused_members(const Call& call) {
  const int64_t pre_norms = has_pre_norm_bank(call) ? call.M : 1;
  const int64_t post_norms = has_post_norm_bank(call) ? call.M_up : 1;
  const int64_t sizes[][3] = {
      {kWDown, call.M, call.R * call.D},     {kBDown, call.M, call.R},
      {kWUp, call.M_up, call.R * call.D},    {kBUp, call.M_up, call.D},
      {kPreNormWeight, pre_norms, call.D},   {kPreNormBias, pre_norms, call.D},
      {kPostNormWeight, post_norms, call.D}, {kPostNormBias, post_norms, call.D}};
  for (const auto& [which, members, size] : sizes) {
    if (call.grad[which] == nullptr || members == 1) continue;
    with_elements<T>(call.parameter_grad(static_cast<int>(which)), [&](auto* grad) {
      std::memset(grad, 0, static_cast<size_t>(members * size) * sizeof *grad);
    });
  }
}

}  // namespace
}  // namespace pelt::gated_adapter
