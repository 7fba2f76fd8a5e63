// The factors of lora_linear on the CPU as its products read them: float32 rows, or panels of pairs
// of bfloat16 for tiles.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include "ops/lora_linear/cpu_rows.h"

namespace pelt::lora_linear {
namespace {

// ---- float32, as both directions read it ----

// W [rows, columns] -> [columns, stride] in float32, from column `first` of the result on. Beyond
// the rows whole vectors are zero.
template <class T>
inline void read_transposed(const T* w, int64_t rows, int64_t columns, float* to, int64_t stride) {
  for (int64_t row = 0; row < rows; row += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, rows - row);
    for_vectors(columns, [&](int64_t column, auto part) {
      Vector block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        block[i] = i < count ? part.load_from(w + (row + i) * columns + column) : Vector{};
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, columns - column); ++i) {
        store(to + (column + i) * stride + row, block[i]);
      }
    });
  }
}

// A's rows with the gates' weights below them, and B's transpose; rows are padded with zeros.
struct Weights {
  float* down[kMaxBranches + 1] = {};  // of each group: [slots, count, row_distance(Din)]
  float* up[kMaxBranches] = {};        // of each branch: [slots, R, row_distance(size)]

  // Memory for them, or with an arena that only counts, its size.
  void place(const Linear& call, const Columns& columns, Arena& arena) {
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      down[g] = arena.take(group.slots * group.count * row_distance(call.Din));
    }
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      up[i] = arena.take(b_bank(branch).slots * branch.R * row_distance(branch.size));
    }
  }

  // Copies the members that the call uses, in the order of the columns.
  template <class T>
  void read(const Linear& call, const Columns& columns) {
    const int64_t stride = row_distance(call.Din);
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      float* to = down[g];
      // The rows of all branches of the group, then the gates' weights; once for each slot.
      for (int64_t slot = 0; slot < group.slots; ++slot) {
        for (int i = group.first_branch; i < group.end_branch; ++i) {
          const Branch& branch = call.branch[i];
          const int64_t first = (a_bank(branch).first_member() + slot) * branch.R;
          with_elements<T>(branch.a, [&](const auto* a) {
            for (int64_t r = 0; r < branch.R; ++r, to += stride) {
              read_row(a + (first + r) * call.Din, call.Din, to);
            }
          });
        }
        for (int j = 0; group.has_gates && j < call.gates; ++j, to += stride) {
          with_elements<T>(call.gate[j].weight, [&](const auto* w) { read_row(w, call.Din, to); });
        }
      }
    }
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      const Bank bank = b_bank(branch);
      const int64_t distance = row_distance(branch.size), floats = branch.size * branch.R;
      with_elements<T>(branch.b, [&](const auto* b) {
        for (int64_t slot = 0; slot < bank.slots; ++slot) {
          read_transposed(b + (bank.first_member() + slot) * floats, branch.size, branch.R,
                          up[i] + slot * branch.R * distance, distance);
        }
      });
    }
  }

  // The rows of a group, or of a branch's transposed B, that serve a sentence.
  const float* down_of(const Linear& call, const Columns& columns, int g, int64_t sentence) const {
    const Group& group = columns.group[g];
    return down[g] + slot_of(call, group, sentence) * group.count * row_distance(call.Din);
  }
  const float* up_of(const Branch& branch, int i, int64_t sentence) const {
    return up[i] + b_bank(branch).slot_of(sentence) * branch.R * row_distance(branch.size);
  }

  // A group of several branches has one slot: none of them has an index for each sample.
  static int64_t slot_of(const Linear& call, const Group& group, int64_t sentence) {
    return group.slots > 1 ? a_bank(call.branch[group.first_branch]).slot_of(sentence) : 0;
  }
};

// ---- pairs ----

// to [count] = a row in bfloat16; T is float or bfloat16.
template <class T>
inline void round_row(const T* from, int64_t count, bf16* to) {
  for_vectors(count,
              [&](int64_t i, auto part) { part.store_to(to + i, part.load_from(from + i)); });
}

// A number as two of bfloat16: the nearest one, and what that leaves out. Beside an infinity
// nothing is left out, not a NaN.
template <class Part>
inline void split(Vector value, Part part, bf16* to, bf16* rest) {
  part.store_to(to, value);
  const Vector left = value - part.load_from(to);
  part.store_to(rest, left - left == 0.0f ? left : Vector{});
}

// to [count] = x times dropout's factors, rounded as x is.
inline void drop_row(const bf16* x, const float* factor, int64_t count, bf16* to) {
  for_vectors(count, [&](int64_t i, auto part) {
    part.store_to(to + i, part.load_from(x + i) * load(factor + i));
  });
}

// The logit of a row from its gate's two sums. What a weight leaves out, times an infinity of x,
// may be a NaN where the whole weight has none: then in float32.
inline float logit_of_pair(const Linear& call, const Gate& gate, int64_t row, const float* sums) {
  float logit = sums[0] + sums[1];
  if (std::isnan(logit)) {
    const bf16* x = static_cast<const bf16*>(call.x) + row * call.Din;
    with_elements<bf16>(gate.weight, [&](const auto* w) { logit = dot_of(x, w, call.Din); });
  }
  return logit;
}

// B [depth, columns] of a product on tiles, one for each slot.
struct PairPanels {
  int64_t depth = 0, columns = 0;
  bf16* data = nullptr;  // [slots][pair_numbers(depth, columns)]

  void take(Arena& arena, int64_t slots) {
    data = arena.take<bf16>(slots * pair_numbers(depth, columns));
  }
  bf16* of(int64_t slot) const { return data + slot * pair_numbers(depth, columns); }

  // From W [depth, columns].
  void pack(int64_t slot, const bf16* w) const {
    for (int64_t column = 0; column < columns; column += kPairColumns) {
      pack_pair_panel(depth, std::min(kPairColumns, columns - column),
                      of(slot) + column * pair_depth(depth),
                      [&](int64_t k) { return w + k * columns + column; });
    }
  }

  // From W [columns, depth].
  void pack_transposed(int64_t slot, const bf16* w) const {
    for (int64_t column = 0; column < columns; column += kPairColumns) {
      pack_pair_panel_transposed(depth, std::min(kPairColumns, columns - column),
                                 of(slot) + column * pair_depth(depth),
                                 [&](int64_t i) { return w + (column + i) * depth; });
    }
  }
};

// Each factor is one operand in forward, and its transpose is one in backward.
struct PairWeights {
  const bool is_backward;
  bf16* rows[kMaxBranches + 1] = {};  // of each group: [slots, count, Din]
  bf16* rounded[kMaxBranches] = {};   // of each float32 B: [slots, size, R]
  PairPanels down[kMaxBranches + 1];  // of each group: [Din, count] | [count, Din]
  PairPanels up[kMaxBranches];        // of each branch: [R, size] | [size, R]
  PairPanels gates;                   // backward's own: [Din, the gates' columns]

  explicit PairWeights(bool of_backward) : is_backward(of_backward) {}

  // In backward depth and columns of each product change places: ds A where x A^T was.
  void place(const Linear& call, const Columns& columns, Arena& arena) {
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      rows[g] = arena.take<bf16>(group.slots * group.count * call.Din);
      down[g].depth = is_backward ? group.count : call.Din;
      down[g].columns = is_backward ? call.Din : group.count;
      down[g].take(arena, group.slots);
    }
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      const int64_t slots = b_bank(branch).slots;
      rounded[i] = arena.take<bf16>(branch.b.is_float32 ? slots * branch.size * branch.R : 0);
      up[i].depth = is_backward ? branch.size : branch.R;
      up[i].columns = is_backward ? branch.R : branch.size;
      up[i].take(arena, slots);
    }
    gates.depth = call.Din;
    gates.columns = call.gates * columns.gate_width;
    gates.take(arena, is_backward ? 1 : 0);
  }

  void read(const Linear& call, const Columns& columns) const {
    for (int g = 0; g < columns.groups; ++g) read_group(call, columns, g);
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      const Bank bank = b_bank(branch);
      const int64_t numbers = branch.size * branch.R;
      // A B in bfloat16 is packed from where it lies.
      const bf16* b = static_cast<const bf16*>(branch.b.data) + bank.first_member() * numbers;
      if (branch.b.is_float32) {
        const float* from =
            static_cast<const float*>(branch.b.data) + bank.first_member() * numbers;
        round_row(from, bank.slots * numbers, rounded[i]);
        b = rounded[i];
      }
      for (int64_t slot = 0; slot < bank.slots; ++slot) pack(up[i], slot, b + slot * numbers);
    }
    // Backward makes the gates' logits again, a product as in forward, of their columns alone.
    if (!is_backward || call.gates == 0) return;
    const int last = columns.groups - 1;
    const int64_t first = columns.of_gates - columns.group[last].place;
    gates.pack_transposed(0, rows[last] + first * call.Din);
  }

 private:
  // Forward multiplies by the transpose of a factor, backward by the factor as it lies.
  void pack(const PairPanels& panels, int64_t slot, const bf16* w) const {
    if (is_backward) {
      panels.pack(slot, w);
    } else {
      panels.pack_transposed(slot, w);
    }
  }

  void read_group(const Linear& call, const Columns& columns, int g) const {
    const Group& group = columns.group[g];
    bf16* to = rows[g];
    for (int64_t slot = 0; slot < group.slots; ++slot) {
      const bf16* first = to;
      for (int i = group.first_branch; i < group.end_branch; ++i) {
        const Branch& branch = call.branch[i];
        const int64_t numbers = branch.R * call.Din;
        with_elements<bf16>(branch.a, [&](const auto* a) {
          round_row(a + (a_bank(branch).first_member() + slot) * numbers, numbers, to);
        });
        to += numbers;
      }
      // A gate's weight takes two rows: its nearest bfloat16, and what that leaves out.
      for (int j = 0; group.has_gates && j < call.gates; ++j, to += 2 * call.Din) {
        with_elements<bf16>(call.gate[j].weight, [&](const auto* w) {
          for_vectors(call.Din, [&](int64_t i, auto part) {
            split(part.load_from(w + i), part, to + i, to + call.Din + i);
          });
        });
      }
      pack(down[g], slot, first);
    }
  }
};

}  // namespace
}  // namespace pelt::lora_linear
