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
//
// On tiles d, the columns beside each other, is kept in bfloat16 as it is and transposed, for it is
// the left side of both dx and the sums over rows, of which a tile's rows are packed for one panel
// of columns at a time. A dlogit is two numbers of bfloat16, as a gate's weight is; dx takes the
// nearest one, for both parts of the weight.
#include <vector>

#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "ops/lora_linear/cpu_backward_pairs.h"

namespace pelt::lora_linear {
namespace {

constexpr int64_t kColumnsAtOnce = 64;  // of dB, in the last step

struct Backward : PairsBackward {
  using PairsBackward::PairsBackward;

  template <class T>
  void run() {
    if (call.branches + call.gates == 0) return;  // dx is the base product
    if (by_pairs) {
      pair_weights.read(call, columns);
    } else {
      weights.read<T>(call, columns);
    }
    parallel_for_on(chunks, threads, [&](int64_t chunk, int thread) {
      const TileScope scope;
      if (by_pairs) clear_pairs(chunk);
      for (int i = 0; i < call.branches; ++i) {
        pass_over_dy<T>(chunk, i, scratch + thread * scratch_floats);
      }
    });
    // Sentences may cross chunks, so this waits for all of them.
    for (int i = 0; i < call.branches; ++i) gate_backward<T>(call.branch[i], dot[i]);
    for (int j = 0; j < call.gates; ++j) {
      for (int64_t b = 0; b < call.B; ++b) divisors[j][b] = divisor_of(call, call.gate[j], b);
    }
    parallel_for_on(chunks, threads, [&](int64_t chunk, int thread) {
      const TileScope scope;
      logits_backward<T>(chunk, scratch + thread * scratch_floats);
      pass_over_x<T>(chunk, scratch + thread * scratch_floats);
    });
    write_sums<T>();
  }

  // ---- raw = dy B, ds, and the sums for dB ----

  // One branch's pass over a chunk's columns of dy that it reaches.
  template <class T>
  void pass_over_dy(int64_t chunk, int i, float* memory) {
    const Branch& branch = call.branch[i];
    const Bank bank = b_bank(branch);
    const int64_t distance = sum_distance(branch.R), stride = sum_distance(branch.size);
    const int64_t first_of_s = first_rank(i);
    float* dy = memory;
    // Memory of the thread: a stretch of dy where it is not read in place, f s of a tile, and raw
    // of all the chunk's tiles, which the stretches add to.
    float* scaled = dy + tiles.tile_rows * kStretchStride;  // [tile, R]: f s
    float* raw = scaled + tiles.tile_rows * distance;       // [tiles, tile, R]
    const PairMemory pairs(*this, memory);
    if (by_pairs) raw = pairs.raw;
    // The chunk's own sums. With slots not every one is met first by a product that overwrites.
    float* sums = up_sums[i] + chunk * bank.slots * up_floats(branch);
    const bool wants_sums = branch.db.data != nullptr;  // a frozen B has none
    if (bank.slots > 1) std::fill(sums, sums + bank.slots * up_floats(branch), 0.0f);
    // A stretch of all the chunk's rows before the next one: its sums stay in cache.
    for (int64_t begin = 0; begin < branch.size; begin += kDotStretch) {
      const int64_t end = std::min(begin + kDotStretch, branch.size);
      for_tiles(chunk, [&](const Tile& tile, int64_t place) {
        float* raw_of = raw + place * tiles.tile_rows * distance;
        float* to = wants_sums ? sums + bank.slot_of(tile.sentence) * up_floats(branch) : nullptr;
        const bool accumulate = place > 0 || bank.slots > 1;
        if (by_pairs) {
          pass_over_dy_pairs(i, tile, begin, end, pairs, raw_of, to, accumulate);
          return;
        }
        const T* rows = static_cast<const T*>(call.dy) + tile.row * call.Dout + branch.offset;
        multiply_dots(tile.rows, branch.R, end - begin, rows + begin, call.Dout,
                      {weights.up_of(branch, i, tile.sentence) + begin, stride}, raw_of, distance,
                      begin > 0);
        if (!wants_sums) return;
        // Made again for each stretch: cheaper than memory for a chunk's f s.
        read_scaled<T>(call, branch, tile, first_of_s, ranks, scaled, distance);
        // dB of the stretch, [R, columns]: rows are the reduction.
        for (int64_t column = begin; column < end; column += kStretch) {
          const int64_t count = std::min(kStretch, end - column);
          multiply_to(branch.R, count, tile.rows, {scaled, 1, distance},
                      stretch_of<T>(call.dy, call.Dout, tile, branch.offset + column, count, dy),
                      to + column, stride, accumulate);
        }
      });
    }
    // raw is complete when all stretches have been added.
    for_tiles(chunk, [&](const Tile& tile, int64_t place) {
      float* raw_of = raw + place * tiles.tile_rows * distance;
      if (by_pairs) {
        // The products over rows take ds transposed: made here, while it is in cache.
        finish_ds<T>(i, tile, raw_of, d_pairs);
        store_transposed(raw_of, distance, tile.rows, branch.R,
                         transposed_of(chunk, place) + columns.of_branch[i] * tiles.tile_rows,
                         tiles.tile_rows);
      } else {
        finish_ds<T>(i, tile, raw_of, d_all);
      }
    });
  }

  // ds = f raw into its columns of d, and <raw, s>; with pairs raw becomes ds too.
  template <class T, class D>
  void finish_ds(int i, const Tile& tile, float* raw, D* d) {
    const Branch& branch = call.branch[i];
    const int64_t distance = sum_distance(branch.R), first_of_s = first_rank(i);
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row, raw += distance) {
      const T* s = static_cast<const T*>(call.s) + row * ranks + first_of_s;
      const float factor = factor_of<T>(call, branch, row);
      D* ds = d + row * columns.stride + columns.of_branch[i];
      // <raw, s>, before the factor: the gradient of scale g itself.
      Vector sum = {};
      for_vectors(branch.R, [&](int64_t r, auto part) {
        const Vector value = part.load_from(raw + r);
        sum += value * part.load_from(s + r);
        part.store_to(ds + r, factor * value);
        if constexpr (sizeof(D) == sizeof(bf16)) part.store_to(raw + r, factor * value);
      });
      dot[i][row] = sum_of(sum);
    }
  }

  // ---- gates ----

  // The gradient of a branch's gate: of a given one, or of a learned one's value.
  template <class T>
  void gate_backward(const Branch& branch, const float* of_rows) {
    const bool is_learned = branch.learned_gate >= 0;
    if (!is_learned && branch.dgate.data == nullptr) return;
    const bool is_per_row =
        is_learned ? !is_pooled(call.gate[branch.learned_gate]) : branch.has_gate_per_row;
    // A learned gate's goes on to its logits, a given one's is a result.
    auto write = [&](int64_t i, double sum) {
      const float value = branch.scale * static_cast<float>(sum);
      if (is_learned) {
        dvalue[branch.learned_gate][i] = value;
      } else {
        write_element<T>(branch.dgate, i, value);
      }
    };
    // A sentence's rows in their order and in float64, by one thread: a few numbers for each row.
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
  void logits_backward(int64_t chunk, float* memory) {
    std::fill_n(bias_sums + chunk * call.gates, call.gates, 0.0);
    if (call.gates == 0) return;
    float* logits = by_pairs ? PairMemory(*this, memory).logits : nullptr;
    // Forward keeps no row's gate: x is read for them once more, and stays in cache for what
    // follows.
    for_tiles(chunk, [&](const Tile& tile, int64_t place) {
      const T* x = static_cast<const T*>(call.x) + tile.row * call.Din;
      if constexpr (sizeof(T) == sizeof(bf16)) {
        if (by_pairs) {
          multiply_pairs_into({x, call.Din}, pair_weights.gates.of(0), call.Din, tile.rows,
                              pair_weights.gates.columns, logits, logit_distance(), false);
        }
      }
      for (int j = 0; j < call.gates; ++j) {
        const Gate& gate = call.gate[j];
        const int64_t column = columns.of_gates + columns.gate_width * j;
        // An extra gate's is given, a branch's was summed in gate_backward.
        const float* dvalue_of = gate.dvalue != nullptr ? gate.dvalue : dvalue[j];
        const float bias = element_of<T>(gate.bias, 0);
        for (int64_t r = 0; r < tile.rows; ++r) {
          const int64_t row = tile.row + r, sentence = row / call.S;
          double dlogit = 0.0;  // of a row that does not count: it has no part in the gate
          if (counts(call, gate, row)) {
            const float logit =
                by_pairs ? logit_of_pair(call, gate, row, logits + r * logit_distance() + 2 * j)
                         : dot_of(x + r * call.Din, row_of_gate(weights.down, j, 0), call.Din);
            // In float64: dlogit is a sum's share, and what is lost here is lost in every row.
            const double s = sigmoid_of(logit + bias);
            const double d = dvalue_of[is_pooled(gate) ? sentence : row] / divisors[j][sentence];
            dlogit = d * s * (1.0 - s);
          }
          bias_sums[chunk * call.gates + j] += dlogit;
          if (by_pairs) {
            put_dlogit(static_cast<float>(dlogit), d_pairs + row * columns.stride + column,
                       transposed_of(chunk, place) + column * tiles.tile_rows + r);
          } else {
            d_all[row * columns.stride + column] = static_cast<float>(dlogit);
          }
        }
      }
    });
  }

  // The row of gate j in the group of the gates' weights, or of their sums: the chunk's.
  float* row_of_gate(float* const* of_groups, int j, int64_t chunk) const {
    const Group& group = columns.group[columns.groups - 1];
    return of_groups[columns.groups - 1] + chunk * group.slots * down_floats(group) +
           (columns.of_gates + columns.gate_width * j - group.place) * sum_distance(call.Din);
  }

  // ---- dx, and the sums for dA and dw ----

  // Does any parameter of the group want its gradient.
  bool wants_sums(const Group& group) const {
    for (int i = group.first_branch; i < group.end_branch; ++i) {
      if (call.branch[i].da.data != nullptr) return true;
    }
    for (int j = 0; group.has_gates && j < call.gates; ++j) {
      if (call.gate[j].dweight.data != nullptr) return true;
    }
    return false;
  }

  template <class T>
  void pass_over_x(int64_t chunk, float* memory) {
    bool wants_any = false, wants[kMaxBranches + 1];
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      wants_any |= wants[g] = wants_sums(group);
      float* sums = down_sums[g] + chunk * group.slots * down_floats(group);
      // With several slots a tile adds to one of them, which no earlier tile may have written.
      if (group.slots > 1) std::fill(sums, sums + group.slots * down_floats(group), 0.0f);
    }
    if (by_pairs) return pass_over_x_pairs(chunk, wants, PairMemory(*this, memory));
    float* x = memory;
    float* dropout = x + tiles.tile_rows * kStretchStride;
    float* through = dropout + tiles.tile_rows * kStretchStride;  // ds A before dropout
    for (int64_t begin = 0; begin < call.Din; begin += kStretch) {
      const int64_t count = std::min(kStretch, call.Din - begin);
      for_tiles(chunk, [&](const Tile& tile, int64_t place) {
        Right of_x = {x, kStretchStride};  // in memory of its own, or where it lies
        // x is needed for the sums alone, dropout's factors also for dx.
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
          // The group's columns of d: ds of its branches, dlogit of its gates.
          const float* d = d_all + tile.row * columns.stride + group.place;
          const int64_t slot = Weights::slot_of(call, group, tile.sentence);
          const int64_t at = slot * down_floats(group) + begin, stride = row_distance(call.Din);
          if (wants[g]) {
            multiply_to(group.count, count, tile.rows, {d, 1, columns.stride}, of_x,
                        down_sums[g] + chunk * group.slots * down_floats(group) + at, stride,
                        place > 0 || group.slots > 1);
          }
          if (call.dx == nullptr) continue;
          T* dx = static_cast<T*>(call.dx) + tile.row * call.Din + begin;
          const Left left = {d, columns.stride, 1};
          const Right right = {weights.down[g] + at, stride};
          // Without dropout the product adds to dx itself; with it, the factors come in between.
          if (!group.is_dropped) {
            multiply_add_to(tile.rows, count, group.count, left, right, dx, call.Din);
            continue;
          }
          // What comes back through A, then through dropout, and is added to dx.
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
    // A task is a row of dA, a block of columns of dB, or a gate; each is written by one thread.
    int64_t tasks = call.gates;
    for (int i = 0; i < call.branches; ++i) tasks += tasks_of_a(i) + tasks_of_b(i);
    for (int i = 0; i < call.branches; ++i) clear_unused_members<T>(call.branch[i]);
    // Numbered branch by branch, A before B, and the gates behind them.
    parallel_for(tasks, threads, [&](int64_t task) {
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
    const Branch& branch = call.branch[i];
    return branch.da.data ? a_bank(branch).slots * branch.R : 0;
  }
  int64_t blocks_of_b(const Branch& branch) const {
    return (branch.size + kColumnsAtOnce - 1) / kColumnsAtOnce;
  }
  int64_t tasks_of_b(int i) const {
    const Branch& branch = call.branch[i];
    return branch.db.data ? b_bank(branch).slots * blocks_of_b(branch) : 0;
  }

  // Where the batch shares one member, the others' gradients are zeros.
  template <class T>
  void clear_unused_members(const Branch& branch) {
    const int64_t floats[2] = {branch.M * branch.R * call.Din, branch.N * branch.R * branch.size};
    // A bank of which the whole batch uses one member.
    const bool is_partial[2] = {branch.M > 1 && !branch.has_a_index_per_sample,
                                branch.N > 1 && !branch.has_b_index_per_sample};
    for (int which = 0; which < 2; ++which) {
      const ParameterGrad& p = which == 0 ? branch.da : branch.db;
      if (p.data == nullptr || !is_partial[which]) continue;
      with_elements<T>(p, [&](auto* grad) {
        std::memset(grad, 0, static_cast<size_t>(floats[which]) * sizeof *grad);
      });
    }
  }

  // to [columns] = the sum of the chunks' rows, `distance` floats apart, each of so many parts.
  template <class T>
  void write_row(const ParameterGrad& p, int64_t first, const float* sums, int64_t distance,
                 int64_t parts) {
    with_elements<T>(p, [&](auto* grad) {
      for_vectors(call.Din, [&](int64_t d, auto part) {
        // On tiles a gate has two rows of sums, of both numbers of its dlogit.
        Vector sum = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          for (int64_t i = 0; i < parts; ++i) {
            sum += part.load_from(sums + chunk * distance + i * sum_distance(call.Din) + d);
          }
        }
        part.store_to(grad + first + d, sum);
      });
    });
  }

  template <class T>
  void write_da(int i, int64_t task) {
    const Branch& branch = call.branch[i];
    const int64_t slot = task / branch.R, r = task % branch.R;
    // The group that holds the branch's rows.
    int g = 0;
    while (i >= columns.group[g].end_branch) ++g;
    const Group& group = columns.group[g];
    const int64_t row = columns.of_branch[i] - group.place + r;
    const int64_t member = a_bank(branch).first_member() + slot;
    write_row<T>(branch.da, (member * branch.R + r) * call.Din,
                 down_sums[g] + slot * down_floats(group) + row * sum_distance(call.Din),
                 group.slots * down_floats(group), 1);
  }

  template <class T>
  void write_gate(int j) {
    const Gate& gate = call.gate[j];
    const Group& group = columns.group[columns.groups - 1];
    if (gate.dweight.data != nullptr) {
      write_row<T>(gate.dweight, 0, row_of_gate(down_sums, j, 0), group.slots * down_floats(group),
                   columns.gate_width);
      if (gate.pooling == Pooling::kMaskedMean) mend_masked_gate<T>(j);
    }
    if (gate.dbias.data == nullptr) return;
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += bias_sums[chunk * call.gates + j];
    write_element<T>(gate.dbias, 0, static_cast<float>(sum));
  }

  // A row that does not count has no part in a gate, whatever it holds; but its dlogit of 0 was
  // multiplied by it. Where that may have been a NaN, the rows that count are added up alone.
  template <class T>
  void mend_masked_gate(int j) {
    const Gate& gate = call.gate[j];
    bool is_finite = true;
    with_elements<T>(gate.dweight, [&](const auto* grad) {
      for (int64_t d = 0; d < call.Din; ++d) is_finite &= std::isfinite(to_float(grad[d]));
    });
    if (is_finite) return;
    // In float32 and one row after the other: exact enough for what is rare, and in a fixed order.
    std::vector<float> sums(static_cast<size_t>(padded(call.Din)), 0.0f);
    const int64_t column = columns.of_gates + columns.gate_width * j;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for_tiles(chunk, [&](const Tile& tile, int64_t place) {
        for (int64_t r = 0; r < tile.rows; ++r) {
          if (!counts(call, gate, tile.row + r)) continue;
          const float dlogit = dlogit_of(chunk, tile, place, r, column);
          const T* x = static_cast<const T*>(call.x) + (tile.row + r) * call.Din;
          for_vectors(call.Din, [&](int64_t d, auto part) {
            store(sums.data() + d, load(sums.data() + d) + dlogit * part.load_from(x + d));
          });
        }
      });
    }
    with_elements<T>(gate.dweight, [&](auto* grad) {
      for_vectors(call.Din,
                  [&](int64_t d, auto part) { part.store_to(grad + d, load(sums.data() + d)); });
    });
  }

  // A row's dlogit as the sums were made with it: on tiles the two numbers together.
  float dlogit_of(int64_t chunk, const Tile& tile, int64_t place, int64_t r, int64_t column) const {
    if (!by_pairs) return d_all[(tile.row + r) * columns.stride + column];
    const bf16* two = transposed_of(chunk, place) + column * tiles.tile_rows + r;
    return to_float(two[0]) + to_float(two[tiles.tile_rows]);
  }

  // dB lies as [size, R], its sums as [R, size].
  template <class T>
  void write_db(int i, int64_t task) {
    const Branch& branch = call.branch[i];
    const Bank bank = b_bank(branch);
    const int64_t slot = task / blocks_of_b(branch), stride = sum_distance(branch.size);
    const int64_t begin = task % blocks_of_b(branch) * kColumnsAtOnce;
    const int64_t end = std::min(begin + kColumnsAtOnce, branch.size);
    const float* sums = up_sums[i] + slot * up_floats(branch);
    const int64_t distance = bank.slots * up_floats(branch);
    with_elements<T>(branch.db, [&](auto* grad) {
      auto* to = grad + (bank.first_member() + slot) * branch.size * branch.R;
      // A square of kWidth columns by kWidth ranks at a time, turned in registers.
      for (int64_t column = begin; column < end; column += kWidth) {
        for_vectors(branch.R, [&](int64_t r, auto part) {
          Vector block[kWidth];
          // One rank of the block in each vector, summed over the chunks in their order.
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
}  // namespace pelt::lora_linear

namespace pelt {

using namespace lora_linear;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
void Kernels::backward(const Call& call, Arena& arena) {
  cpu::run<Backward>(call, arena);
}

}  // namespace pelt
