// lora_linear backward on the CPU, from x, s = dropout(x) A^T and the gates' values. dx holds dy
// times the base weight already. With f = scale g of a branch's row and raw = dy B over its
// columns:
//
//   ds = f raw       dgate = scale <raw, s>       dx += dropout(ds A) + dlogit w
//   dB = dy^T (f s)  dA = ds^T dropout(x)         dw = dlogit^T x,  db = sum of dlogit
//
// Rows are cut into chunks, at most kMostChunks, each with its own sums for the parameters; the cut
// depends on the shapes alone, and a last step adds the sums in the chunks' order. So bits do not
// depend on the threads, and x, dy and dx are passed by once:
//
//   first   a chunk's dy, in stretches of columns: raw and the sums for dB
//   gates   dgate of each sentence from the rows' <raw, s>
//   second  a chunk's x, in stretches: logits again, then dx and the sums for dA and dw
//
// The gates' logits are columns beside ds, their weights rows below A: one product serves both.
#include "ops/lora_linear/cpu_rows.h"

namespace pelt::lora_linear {
namespace {

constexpr int64_t kMostChunks = 32;
constexpr int64_t kChunkRows = 64;      // at least
constexpr int64_t kColumnsAtOnce = 64;  // of dB, in the last step

struct Backward {
  const CpuCall& call;
  Columns columns;
  Tiles tiles;
  int64_t ranks;
  int64_t chunks = 1;
  Weights weights;
  float* down_sums[kCpuBranches + 1] = {};  // [chunks, slots, count, row_distance(Din)]
  float* up_sums[kCpuBranches] = {};        // [chunks, slots, R, row_distance(size)]
  double* bias_sums = nullptr;              // [chunks, gates]
  float* d_all = nullptr;                   // [B * S, columns]: ds and dlogit
  float* dot[kCpuBranches] = {};            // [B * S]: <raw, s>
  float* dvalue[kCpuGates] = {};            // [B] | [B, S]
  double* divisors[kCpuGates] = {};         // [B]
  float* scratch = nullptr;
  int64_t scratch_floats = 0;

  explicit Backward(const CpuCall& c) : call(c), columns(c), tiles(c), ranks(rank_sum(c)) {
    const int64_t rows = rows_of(call), floats = std::max<int64_t>(1, floats_of_sums());
    // The sums together are no more than half of what dx and dy are.
    const int64_t affordable = rows * (call.Din + call.Dout) / 2 / floats;
    chunks = std::min({kMostChunks, rows / kChunkRows, affordable, tiles.count()});
    chunks = std::max<int64_t>(chunks, 1);
  }

  int64_t down_floats(const Group& group) const { return group.count * row_distance(call.Din); }
  int64_t up_floats(const CpuBranch& branch) const { return branch.R * row_distance(branch.size); }
  int64_t floats_of_sums() const {
    int64_t floats = 0;
    for (int g = 0; g < columns.groups; ++g) {
      floats += columns.group[g].slots * down_floats(columns.group[g]);
    }
    for (int i = 0; i < call.branches; ++i) {
      floats += b_bank(call.branch[i]).slots * up_floats(call.branch[i]);
    }
    return floats;
  }

  int64_t place(Arena arena) {
    const int64_t rows = rows_of(call);
    weights.place(call, columns, arena);
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      down_sums[g] = arena.take(chunks * group.slots * down_floats(group));
    }
    int64_t most = 0;
    for (int i = 0; i < call.branches; ++i) {
      const CpuBranch& branch = call.branch[i];
      const int64_t slots = b_bank(branch).slots;
      up_sums[i] = arena.take(chunks * slots * up_floats(branch));
      dot[i] = arena.take(rows);
      most = std::max(most, row_distance(branch.R));
    }
    for (int j = 0; j < call.gates; ++j) {
      dvalue[j] = arena.take(rows);
      divisors[j] = arena.take<double>(call.B);
    }
    bias_sums = arena.take<double>(chunks * call.gates);
    d_all = arena.take(rows * columns.stride + kWidth);
    // A stretch of x or dy, dropout's factors and what they multiply, a branch's f s, and its raw
    // for all rows of a chunk.
    const int64_t chunk_rows = ((tiles.count() + chunks - 1) / chunks) * tiles.tile_rows;
    const int64_t stretches = has_dropout(call) ? 3 : 1;
    scratch_floats = tiles.tile_rows * (stretches * kStretchStride + most) + chunk_rows * most;
    scratch_floats = round_up(scratch_floats, 16);
    scratch = arena.take(scratch_floats * call.threads);
    return round_up(arena.used, 64);
  }

  template <class T>
  void run() {
    weights.read<T>(call, columns);
    parallel_for_on(chunks, call.threads, [&](int64_t chunk, int thread) {
      for (int i = 0; i < call.branches; ++i) {
        pass_over_dy<T>(chunk, i, scratch + thread * scratch_floats);
      }
    });
    for (int i = 0; i < call.branches; ++i) gate_backward<T>(call.branch[i], dot[i]);
    for (int j = 0; j < call.gates; ++j) {
      for (int64_t b = 0; b < call.B; ++b) divisors[j][b] = divisor_of(call, call.gate[j], b);
    }
    parallel_for_on(chunks, call.threads, [&](int64_t chunk, int thread) {
      logits_backward<T>(chunk);
      pass_over_x<T>(chunk, scratch + thread * scratch_floats);
    });
    write_sums<T>();
  }

  template <class Visit>
  void for_tiles(int64_t chunk, Visit&& visit) const {
    const int64_t begin = tiles.count() * chunk / chunks,
                  end = tiles.count() * (chunk + 1) / chunks;
    for (int64_t i = begin; i < end; ++i) visit(tiles.at(i), i == begin);
  }

  // ---- raw = dy B, ds, and the sums for dB ----

  template <class T>
  void pass_over_dy(int64_t chunk, int i, float* memory) {
    const CpuBranch& branch = call.branch[i];
    const Bank bank = b_bank(branch);
    const int64_t distance = row_distance(branch.R), stride = row_distance(branch.size);
    const int64_t first = columns.of_branch[i], first_row = row_of(chunk);
    int64_t first_of_s = 0;
    for (int k = 0; k < i; ++k) first_of_s += call.branch[k].R;
    float* dy = memory;
    float* scaled = dy + tiles.tile_rows * kStretchStride;  // [tile, R]: f s
    float* raw = scaled + tiles.tile_rows * distance;       // [chunk, R]
    float* sums = up_sums[i] + chunk * bank.slots * up_floats(branch);
    const bool wants_sums = branch.b.grad != nullptr;
    if (bank.slots > 1) std::fill(sums, sums + bank.slots * up_floats(branch), 0.0f);
    for (int64_t begin = 0; begin < branch.size; begin += kDotStretch) {
      const int64_t end = std::min(begin + kDotStretch, branch.size);
      for_tiles(chunk, [&](const Tile& tile, bool is_first) {
        const T* rows = static_cast<const T*>(call.dy) + tile.row * call.Dout + branch.offset;
        multiply_dots(tile.rows, branch.R, end - begin, rows + begin, call.Dout,
                      {weights.up_of(branch, i, tile.sentence) + begin, stride},
                      raw + (tile.row - first_row) * distance, distance, begin > 0);
        if (!wants_sums) return;
        read_scaled<T>(call, branch, tile, first_of_s, ranks, scaled, distance);
        float* to = sums + bank.slot_of(tile.sentence) * up_floats(branch);
        for (int64_t column = begin; column < end; column += kStretch) {
          const int64_t count = std::min(kStretch, end - column);
          multiply_to(branch.R, count, tile.rows, {scaled, 1, distance},
                      stretch_of<T>(call.dy, call.Dout, tile, branch.offset + column, count, dy),
                      to + column, stride, !is_first || bank.slots > 1);
        }
      });
    }
    for_tiles(chunk, [&](const Tile& tile, bool) {
      for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
        const float* of_row = raw + (row - first_row) * distance;
        const T* s = static_cast<const T*>(call.s) + row * ranks + first_of_s;
        const float factor = factor_of<T>(call, branch, row);
        float* ds = d_all + row * columns.stride + first;
        Vector sum = {};
        for_vectors(branch.R, [&](int64_t r, auto part) {
          const Vector value = part.load_from(of_row + r);
          sum += value * part.load_from(s + r);
          part.store_to(ds + r, factor * value);
        });
        dot[i][row] = sum_of(sum);
      }
    });
  }

  int64_t row_of(int64_t chunk) const { return tiles.at(tiles.count() * chunk / chunks).row; }

  // ---- gates ----

  // The gradient of a branch's gate: of a given one, or of a learned one's value.
  template <class T>
  void gate_backward(const CpuBranch& branch, const float* of_rows) {
    const bool is_learned = branch.learned_gate >= 0;
    if (!is_learned && branch.gate.grad == nullptr) return;
    const bool is_per_row =
        is_learned ? !is_pooled(call.gate[branch.learned_gate]) : branch.has_gate_per_row;
    auto write = [&](int64_t i, double sum) {
      const float value = branch.scale * static_cast<float>(sum);
      if (is_learned) {
        dvalue[branch.learned_gate][i] = value;
      } else {
        write_element<T>(branch.gate, i, value);
      }
    };
    for (int64_t b = 0; b < call.B; ++b) {
      double sum = 0.0;
      for (int64_t row = b * call.S; row < (b + 1) * call.S; ++row) {
        if (is_per_row) {
          write(row, of_rows[row]);
        } else {
          sum += of_rows[row];
        }
      }
      if (!is_per_row) write(b, sum);
    }
  }

  // dlogit of a chunk's rows, from their logits made again.
  template <class T>
  void logits_backward(int64_t chunk) {
    for (int j = 0; j < call.gates; ++j) {
      const CpuGate& gate = call.gate[j];
      const float* weight = row_of_gate(weights.down, j, 0);
      const float* dvalue_of = gate.dvalue != nullptr ? gate.dvalue : dvalue[j];
      const float bias = element<T>(gate.bias, 0);
      double sum = 0.0;
      for_tiles(chunk, [&](const Tile& tile, bool) {
        for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
          const int64_t sentence = row / call.S;
          double dlogit = 0.0;  // of a row that does not count: it has no part in the gate
          if (counts(call, gate, row)) {
            const T* x = static_cast<const T*>(call.x) + row * call.Din;
            const double s = sigmoid_of(dot_of(x, weight) + bias);
            const double d = dvalue_of[is_pooled(gate) ? sentence : row] / divisors[j][sentence];
            dlogit = d * s * (1.0 - s);
          }
          d_all[row * columns.stride + columns.of_gates + j] = static_cast<float>(dlogit);
          sum += dlogit;
        }
      });
      bias_sums[chunk * call.gates + j] = sum;
    }
  }

  // The row of gate j in the group of the gates' weights, or of their sums: the chunk's.
  float* row_of_gate(float* const* of_groups, int j, int64_t chunk) const {
    const Group& group = columns.group[columns.groups - 1];
    return of_groups[columns.groups - 1] + chunk * group.slots * down_floats(group) +
           (columns.of_gates + j - group.place) * row_distance(call.Din);
  }

  template <class T>
  float dot_of(const T* x, const float* w) const {
    Vector sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= call.Din; i += 4 * kWidth) {
      for (int k = 0; k < 4; ++k) sum[k] += load(x + i + k * kWidth) * load(w + i + k * kWidth);
    }
    for (; i + kWidth <= call.Din; i += kWidth) sum[0] += load(x + i) * load(w + i);
    if (i < call.Din) sum[1] += load_part(x + i, call.Din - i) * load_part(w + i, call.Din - i);
    return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // ---- dx, and the sums for dA and dw ----

  bool wants_sums(const Group& group) const {
    for (int i = group.first_branch; i < group.end_branch; ++i) {
      if (call.branch[i].a.grad != nullptr) return true;
    }
    for (int j = 0; group.has_gates && j < call.gates; ++j) {
      if (call.gate[j].weight.grad != nullptr) return true;
    }
    return false;
  }

  template <class T>
  void pass_over_x(int64_t chunk, float* memory) {
    bool wants_any = false, wants[kCpuBranches + 1];
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      wants_any |= wants[g] = wants_sums(group);
      float* sums = down_sums[g] + chunk * group.slots * down_floats(group);
      if (group.slots > 1) std::fill(sums, sums + group.slots * down_floats(group), 0.0f);
    }
    float* x = memory;
    float* dropout = x + tiles.tile_rows * kStretchStride;
    float* through = dropout + tiles.tile_rows * kStretchStride;  // ds A before dropout
    for (int64_t begin = 0; begin < call.Din; begin += kStretch) {
      const int64_t count = std::min(kStretch, call.Din - begin);
      for_tiles(chunk, [&](const Tile& tile, bool is_first) {
        Right of_x = {x, kStretchStride};
        if (has_dropout(call)) {
          read_dropout(call, tile, begin, count, dropout);
          if (wants_any) read_stretch<T>(call.x, call.Din, tile, begin, count, x);
        } else if (wants_any) {
          of_x = stretch_of<T>(call.x, call.Din, tile, begin, count, x);
        }
        bool is_x_dropped = false;
        // The gates come last and see x as it is, so they go first.
        for (int g = columns.groups - 1; g >= 0; --g) {
          const Group& group = columns.group[g];
          if (group.is_dropped && !is_x_dropped && wants_any) {
            multiply_stretch(tile, count, dropout, x);
            is_x_dropped = true;
          }
          const float* d = d_all + tile.row * columns.stride + group.place;
          const int64_t slot = Weights::slot_of(call, group, tile.sentence);
          const int64_t at = slot * down_floats(group) + begin, stride = row_distance(call.Din);
          if (wants[g]) {
            multiply_to(group.count, count, tile.rows, {d, 1, columns.stride}, of_x,
                        down_sums[g] + chunk * group.slots * down_floats(group) + at, stride,
                        !is_first || group.slots > 1);
          }
          if (call.dx == nullptr) continue;
          T* dx = static_cast<T*>(call.dx) + tile.row * call.Din + begin;
          const Left left = {d, columns.stride, 1};
          const Right right = {weights.down[g] + at, stride};
          if (!group.is_dropped) {
            multiply_add_to(tile.rows, count, group.count, left, right, dx, call.Din);
            continue;
          }
          multiply_to(tile.rows, count, group.count, left, right, through, kStretchStride, false);
          for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t row = r * kStretchStride;
            for_vectors(count, [&](int64_t i, auto part) {
              T* to = dx + r * call.Din + i;
              part.store_to(to,
                            part.load_from(to) + load(dropout + row + i) * load(through + row + i));
            });
          }
        }
      });
    }
  }

  // ---- the parameters' gradients: the chunks' sums in their order ----

  template <class T>
  void write_sums() {
    int64_t tasks = call.gates;
    for (int i = 0; i < call.branches; ++i) tasks += tasks_of_a(i) + tasks_of_b(i);
    for (int i = 0; i < call.branches; ++i) clear_unused_members<T>(call.branch[i]);
    parallel_for(tasks, call.threads, [&](int64_t task) {
      for (int i = 0; i < call.branches; ++i) {
        if (task < tasks_of_a(i)) return write_da<T>(i, task);
        task -= tasks_of_a(i);
        if (task < tasks_of_b(i)) return write_db<T>(i, task);
        task -= tasks_of_b(i);
      }
      write_gate<T>(static_cast<int>(task));
    });
  }

  int64_t tasks_of_a(int i) const {
    const CpuBranch& branch = call.branch[i];
    return branch.a.grad ? a_bank(branch).slots * branch.R : 0;
  }
  int64_t blocks_of_b(const CpuBranch& branch) const {
    return (branch.size + kColumnsAtOnce - 1) / kColumnsAtOnce;
  }
  int64_t tasks_of_b(int i) const {
    const CpuBranch& branch = call.branch[i];
    return branch.b.grad ? b_bank(branch).slots * blocks_of_b(branch) : 0;
  }

  template <class T>
  void clear_unused_members(const CpuBranch& branch) {
    const int64_t floats[2] = {branch.M * branch.R * call.Din, branch.N * branch.R * branch.size};
    const bool is_partial[2] = {branch.M > 1 && !branch.has_a_index_per_sample,
                                branch.N > 1 && !branch.has_b_index_per_sample};
    for (int which = 0; which < 2; ++which) {
      const CpuParameter& p = which == 0 ? branch.a : branch.b;
      if (p.grad == nullptr || !is_partial[which]) continue;
      with_grad<T>(p, [&](auto* grad) {
        std::memset(grad, 0, static_cast<size_t>(floats[which]) * sizeof *grad);
      });
    }
  }

  // to [columns] = the sum of the chunks' rows, `distance` floats apart.
  template <class T>
  void write_row(const CpuParameter& p, int64_t first, const float* sums, int64_t distance) {
    with_grad<T>(p, [&](auto* grad) {
      for_vectors(call.Din, [&](int64_t d, auto part) {
        Vector sum = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum += part.load_from(sums + chunk * distance + d);
        }
        part.store_to(grad + first + d, sum);
      });
    });
  }

  template <class T>
  void write_da(int i, int64_t task) {
    const CpuBranch& branch = call.branch[i];
    const int64_t slot = task / branch.R, r = task % branch.R;
    int g = 0;
    while (i >= columns.group[g].end_branch) ++g;
    const Group& group = columns.group[g];
    const int64_t row = columns.of_branch[i] - group.place + r;
    const int64_t member = a_bank(branch).first_member + slot;
    write_row<T>(branch.a, (member * branch.R + r) * call.Din,
                 down_sums[g] + slot * down_floats(group) + row * row_distance(call.Din),
                 group.slots * down_floats(group));
  }

  template <class T>
  void write_gate(int j) {
    const CpuGate& gate = call.gate[j];
    const Group& group = columns.group[columns.groups - 1];
    if (gate.weight.grad != nullptr) {
      write_row<T>(gate.weight, 0, row_of_gate(down_sums, j, 0), group.slots * down_floats(group));
    }
    if (gate.bias.grad == nullptr) return;
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += bias_sums[chunk * call.gates + j];
    write_element<T>(gate.bias, 0, static_cast<float>(sum));
  }

  // dB lies as [size, R], its sums as [R, size].
  template <class T>
  void write_db(int i, int64_t task) {
    const CpuBranch& branch = call.branch[i];
    const Bank bank = b_bank(branch);
    const int64_t slot = task / blocks_of_b(branch), stride = row_distance(branch.size);
    const int64_t begin = task % blocks_of_b(branch) * kColumnsAtOnce;
    const int64_t end = std::min(begin + kColumnsAtOnce, branch.size);
    const float* sums = up_sums[i] + slot * up_floats(branch);
    const int64_t distance = bank.slots * up_floats(branch);
    with_grad<T>(branch.b, [&](auto* grad) {
      auto* to = grad + (bank.first_member + slot) * branch.size * branch.R;
      for (int64_t column = begin; column < end; column += kWidth) {
        for_vectors(branch.R, [&](int64_t r, auto part) {
          Vector block[kWidth];
          for (int64_t k = 0; k < kWidth; ++k) {
            block[k] = Vector{};
            for (int64_t chunk = 0; chunk < chunks && r + k < branch.R; ++chunk) {
              block[k] += load(sums + chunk * distance + (r + k) * stride + column);
            }
          }
          transpose(block);
          for (int64_t k = 0; k < std::min<int64_t>(kWidth, end - column); ++k) {
            part.store_to(to + (column + k) * branch.R + r, block[k]);
          }
        });
      }
    });
  }
};

}  // namespace

template <>
int64_t cpu_backward_workspace_bytes<cpu::Isa::PELT_CPU_ISA>(const CpuCall& call) {
  return Backward(call).place(Arena{});
}

template <>
void cpu_backward<cpu::Isa::PELT_CPU_ISA>(const CpuCall& call) {
  Backward backward(call);
  backward.place(Arena{static_cast<char*>(call.workspace)});
  if (call.dtype == DType::kF32) {
    backward.run<float>();
  } else {
    backward.run<bf16>();
  }
}

}  // namespace pelt::lora_linear
