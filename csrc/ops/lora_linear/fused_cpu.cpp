// lora_linear forward on the CPU. y holds the base product already:
//
//   s = dropout(x) A^T,  logit = x . w + b       for all branches and gates, one pass over x
//   y[:, columns_i] += scale_i g_i s_i B_i^T     in place, one pass over y
//
// Rows are cut into tiles of kTileRows. A tile's x is read once, in stretches of columns that stay
// in the first cache: converted to float32, multiplied by dropout's factors if there are any, and
// then by the columns [A_0; A_1; ...; w_0; ...], which are packed with the columns of x in the
// outer place. Then the tile's part of y is read, added to and written once for each branch.
//
// A pooled gate scales a sentence only when all its rows have been seen: then the second half runs
// over all tiles after the first one did.
//
// s is rounded to the activation's type before B sees it, so that backward, which reads it from
// memory, uses the same numbers. Each row is computed alone and every sum has one order, so bits
// depend neither on tiles nor on threads.
#include "ops/lora_linear/cpu_rows.h"

namespace pelt::lora_linear {
namespace {

struct Forward {
  const CpuCall& call;
  Columns columns;
  Tiles tiles;
  int64_t ranks;
  float* down[kCpuBranches + 1] = {};  // of each group: [slots, Din, padded count]
  float* up[kCpuBranches] = {};        // of each branch: [slots, R, row_distance(size)]
  float* gates = nullptr;              // [gates, B * S]: each row's
  float* scratch = nullptr;
  int64_t scratch_floats = 0;

  explicit Forward(const CpuCall& c) : call(c), columns(c), tiles(c), ranks(rank_sum(c)) {}

  int64_t place(Arena arena) {
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      down[g] = arena.take(group.slots * call.Din * padded(group.count));
    }
    for (int i = 0; i < call.branches; ++i) {
      const CpuBranch& branch = call.branch[i];
      up[i] = arena.take(b_bank(branch).slots * branch.R * row_distance(branch.size));
    }
    gates = arena.take(call.gates * rows_of(call));
    // A stretch of x (or a branch's scaled s, which is no wider), dropout's factors, all columns.
    const int64_t stretches = has_dropout(call) ? 2 : 1;
    scratch_floats = round_up(kTileRows * (stretches * kStretchStride + columns.stride), 16);
    scratch = arena.take(scratch_floats * call.threads);
    return round_up(arena.used, 64);
  }

  template <class T>
  void run() {
    pack<T>();
    const bool waits = has_pooled_branch();
    parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
      const Tile tile = tiles.at(i);
      float* memory = scratch + thread * scratch_floats;
      project_down<T>(tile, memory);
      if (!waits) project_up<T>(tile, memory);
    });
    for (int j = 0; j < call.gates; ++j) {
      if (is_pooled(call.gate[j])) pool(call.gate[j], gates + j * rows_of(call));
    }
    if (!waits) return;
    parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
      project_up<T>(tiles.at(i), scratch + thread * scratch_floats);
    });
  }

  bool has_pooled_branch() const {
    for (int i = 0; i < call.branches; ++i) {
      const int gate = call.branch[i].learned_gate;
      if (gate >= 0 && is_pooled(call.gate[gate])) return true;
    }
    return false;
  }

  template <class T>
  void pack() {
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      const int64_t width = padded(group.count);
      for (int64_t slot = 0; slot < group.slots; ++slot) {
        float* to = down[g] + slot * call.Din * width;
        for (int i = group.first_branch; i < group.end_branch; ++i) {
          const CpuBranch& branch = call.branch[i];
          const int64_t member = a_bank(branch).first_member + slot;
          with_data<T>(branch.a, [&](const auto* a) {
            put_columns(a + member * branch.R * call.Din, branch.R,
                        columns.of_branch[i] - group.place, width, to);
          });
        }
        for (int j = 0; group.has_gates && j < call.gates; ++j) {
          with_data<T>(call.gate[j].weight, [&](const auto* w) {
            put_columns(w, 1, columns.of_gates + j - group.place, width, to);
          });
        }
      }
    }
    for (int i = 0; i < call.branches; ++i) {
      const CpuBranch& branch = call.branch[i];
      const int64_t stride = row_distance(branch.size), floats = branch.R * stride;
      const Bank bank = b_bank(branch);
      with_data<T>(branch.b, [&](const auto* b) {
        for (int64_t slot = 0; slot < bank.slots; ++slot) {
          read_transposed(b + (bank.first_member + slot) * branch.size * branch.R, branch.size,
                          branch.R, up[i] + slot * floats, stride);
        }
      });
    }
  }

  // Rows of a weight [rows, Din] as columns [Din, width], from `column` on. In order, so that what
  // a last vector of zeros covers is overwritten by the rows after it.
  template <class T>
  void put_columns(const T* w, int64_t rows, int64_t column, int64_t width, float* to) {
    if (column % kWidth == 0 && (rows % kWidth == 0 || column + padded(rows) <= width)) {
      read_transposed(w, rows, call.Din, to + column, width);
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      for_vectors(call.Din, [&](int64_t i, auto part) {
        const Vector values = part.load_from(w + row * call.Din + i);
        const int64_t count = std::min<int64_t>(kWidth, call.Din - i);
        for (int64_t k = 0; k < count; ++k) to[(i + k) * width + column + row] = values[k];
      });
    }
  }

  // ---- s = dropout(x) A^T, and the rows' gates ----

  template <class T>
  void project_down(const Tile& tile, float* memory) {
    float* x = memory;
    float* all = x + kTileRows * kStretchStride;  // [tile, columns]
    float* dropout = all + kTileRows * columns.stride;
    for (int64_t begin = 0; begin < call.Din && columns.groups > 0; begin += kStretch) {
      const int64_t count = std::min(kStretch, call.Din - begin);
      read_stretch<T>(call.x, call.Din, tile, begin, count, x);
      multiply_groups(tile, begin, count, x, all, false);
      if (!has_dropout(call)) continue;
      read_dropout(call, tile, begin, count, dropout);
      multiply_stretch(tile, count, dropout, x);
      multiply_groups(tile, begin, count, x, all, true);
    }
    store_s<T>(tile, all);
    for (int j = 0; j < call.gates; ++j) {
      const CpuGate& gate = call.gate[j];
      const float bias = element<T>(gate.bias, 0);
      float* values = is_pooled(gate) ? gates + j * rows_of(call) : gate.value;
      for (int64_t r = 0; r < tile.rows; ++r) {
        values[tile.row + r] = sigmoid_of(all[r * columns.stride + columns.of_gates + j] + bias);
      }
    }
  }

  void multiply_groups(const Tile& tile, int64_t begin, int64_t count, const float* x, float* all,
                       bool dropped) {
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      if (group.is_dropped != dropped) continue;
      const int64_t width = padded(group.count);
      int64_t slot = 0;
      if (group.slots > 1) slot = a_bank(call.branch[group.first_branch]).slot_of(tile.sentence);
      const float* w = down[g] + (slot * call.Din + begin) * width;
      multiply_to(tile.rows, width, count, {x, kStretchStride, 1}, {w, width}, all + group.place,
                  columns.stride, begin > 0);
    }
  }

  template <class T>
  void store_s(const Tile& tile, const float* all) {
    int64_t first = 0;
    for (int i = 0; i < call.branches; ++i) {
      const int64_t R = call.branch[i].R;
      for (int64_t r = 0; r < tile.rows; ++r) {
        T* s = static_cast<T*>(call.s) + (tile.row + r) * ranks + first;
        const float* from = all + r * columns.stride + columns.of_branch[i];
        for_vectors(R, [&](int64_t k, auto part) { part.store_to(s + k, load(from + k)); });
      }
      first += R;
    }
  }

  // A row that does not count has no part in a gate, whatever it holds.
  void pool(const CpuGate& gate, const float* of_rows) {
    for (int64_t b = 0; b < call.B; ++b) {
      double sum = 0.0;
      for (int64_t row = b * call.S; row < (b + 1) * call.S; ++row) {
        if (counts(call, gate, row)) sum += of_rows[row];
      }
      gate.value[b] = static_cast<float>(sum / divisor_of(call, gate, b));
    }
  }

  // ---- y += scale g s B^T ----

  template <class T>
  void project_up(const Tile& tile, float* memory) {
    int64_t first = 0;
    for (int i = 0; i < call.branches; ++i) {
      const CpuBranch& branch = call.branch[i];
      const int64_t stride = row_distance(branch.size), distance = row_distance(branch.R);
      read_scaled<T>(call, branch, tile, first, ranks, memory, distance);
      const float* b = up[i] + b_bank(branch).slot_of(tile.sentence) * branch.R * stride;
      multiply_add_to(tile.rows, branch.size, branch.R, {memory, distance, 1}, {b, stride},
                      static_cast<T*>(call.y) + tile.row * call.Dout + branch.offset, call.Dout);
      first += branch.R;
    }
  }
};

}  // namespace

template <>
int64_t cpu_forward_workspace_bytes<cpu::Isa::PELT_CPU_ISA>(const CpuCall& call) {
  return Forward(call).place(Arena{});
}

template <>
void cpu_forward<cpu::Isa::PELT_CPU_ISA>(const CpuCall& call) {
  Forward forward(call);
  forward.place(Arena{static_cast<char*>(call.workspace)});
  if (call.dtype == DType::kF32) {
    forward.run<float>();
  } else {
    forward.run<bf16>();
  }
}

}  // namespace pelt::lora_linear
