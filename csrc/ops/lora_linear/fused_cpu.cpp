// lora_linear forward on the CPU. y holds the base product already:
//
//   s = dropout(x) A^T,  logit = x . w + b       for all branches and gates, one pass over x
//   y[:, columns_i] += scale_i g_i s_i B_i^T     in place, one pass over y
//
// Rows are cut into tiles. A tile's x is read once, a few rows at a time, and
// multiplied by all the rows [A_0; A_1; ...; w_0; ...]; only dropout needs it in memory again, in
// stretches of columns that stay in the first cache. Then the tile's part of y is read, added to
// and written once for each branch.
//
// A pooled gate scales a sentence only when all its rows have been seen: then the second half runs
// over all tiles after the first one did.
//
// On tiles x is the left side of the first product where it lies, dropped rows aside, which are
// written in bfloat16; and s is that of the second, whose sums the epilogue multiplies by scale g
// and adds to y.
//
// s is rounded to the activation's type before B sees it, so that backward, which reads it from
// memory, uses the same numbers. Each row is computed alone and every sum has one order, so bits
// depend neither on tiles nor on threads.
#include "common/check.h"
#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "ops/lora_linear/cpu_weights.h"

namespace pelt::lora_linear {
namespace {

// Eager reads the factors as they lie: one row at Din = 4096, R = 64 takes it 0.9 of the time.
constexpr int64_t kFewRows = 2, kLargeFactor = 1 << 17;
// Beyond these, factors are products like any other, and torch's own are faster: forward + backward
// of 256 ranks took 1.25 of eager's time (T = 1024, D = 768 and 1024; 192 ranks 0.93, EPYC Zen 3).
// In bfloat16 eager is far slower than that.
constexpr int64_t kMostRanks = 192;

struct Forward {
  Linear call;
  int threads;
  Columns columns;
  Tiles tiles;
  int64_t ranks;
  Weights weights;
  PairWeights pair_weights{/*is_backward=*/false};
  float* gates = nullptr;    // [gates, B * S]: each row's, where they are pooled
  float* scratch = nullptr;  // of all threads
  int64_t scratch_floats = 0;
  bool by_pairs;

  explicit Forward(const Call& from)
      : call(Linear::of(from)),
        threads(from.threads),
        columns(call),
        tiles(call),
        ranks(call.ranks),
        by_pairs(uses_pairs(call)) {}

  // Cuts the workspace into its arrays.
  void place(Arena& arena) {
    if (by_pairs) {
      pair_weights.place(call, columns, arena);
    } else {
      weights.place(call, columns, arena);
    }
    gates = arena.take(call.gates * rows_of(call));
    scratch_floats = round_up(tiles.tile_rows * floats_of_row(), 16);
    scratch = arena.take(scratch_floats * threads);
  }

  // A stretch of x (or a branch's scaled s, which is no wider), dropout's factors, all columns;
  // with pairs all columns and dropped x, or a branch's s and its factor.
  int64_t floats_of_row() const {
    if (!by_pairs) return (has_dropout(call) ? 2 : 1) * kStretchStride + columns.stride;
    int64_t most = columns.stride + (has_dropout(call) ? pair_distance(call.Din) / 2 : 0);
    for (int i = 0; i < call.branches; ++i) {
      most = std::max(most, pair_distance(call.branch[i].R) / 2 + 1);
    }
    return most;
  }

  template <class T>
  void run() {
    if (call.branches + call.gates == 0) return;  // y is the base product
    // Once a call, before the rows: they are a few columns beside x.
    if (by_pairs) {
      pair_weights.read(call, columns);
    } else {
      weights.read<T>(call, columns);
    }
    // While a tile's y may be written at once, x, s and y of a tile are in cache together.
    const bool waits = has_pooled_branch();
    parallel_for_on(tiles.count(), threads, [&](int64_t i, int thread) {
      const TileScope scope;
      const Tile tile = tiles.at(i);
      float* memory = scratch + thread * scratch_floats;
      project_down<T>(tile, memory);
      if (!waits) project_up<T>(tile, memory);
    });
    // Sentences may cross tiles, so this waits for all of them.
    for (int j = 0; j < call.gates; ++j) {
      if (is_pooled(call.gate[j])) pool(call.gate[j], gates + j * rows_of(call));
    }
    if (!waits) return;
    parallel_for_on(tiles.count(), threads, [&](int64_t i, int thread) {
      const TileScope scope;
      project_up<T>(tiles.at(i), scratch + thread * scratch_floats);
    });
  }

  // Is a branch scaled by what is known of a whole sentence only. Extra gates scale nothing.
  bool has_pooled_branch() const {
    for (int i = 0; i < call.branches; ++i) {
      const int gate = call.branch[i].learned_gate;
      if (gate >= 0 && is_pooled(call.gate[gate])) return true;
    }
    return false;
  }

  // ---- s = dropout(x) A^T, and the rows' gates ----

  template <class T>
  void project_down(const Tile& tile, float* memory) {
    const float* all =
        by_pairs ? multiply_pairs(tile, memory) : multiply_stretches<T>(tile, memory);
    store_s<T>(tile, all);
    // Pooled gates keep their rows' values apart until the sentence is complete.
    for (int j = 0; j < call.gates; ++j) {
      const Gate& gate = call.gate[j];
      const float bias = element_of<T>(gate.bias, 0);
      float* values = is_pooled(gate) ? gates + j * rows_of(call) : gate.value;
      for (int64_t r = 0; r < tile.rows; ++r) {
        // On tiles a logit is the sum of two columns' products.
        const float* sums = all + r * columns.stride + columns.of_gates + columns.gate_width * j;
        const float logit = by_pairs ? logit_of_pair(call, gate, tile.row + r, sums) : sums[0];
        values[tile.row + r] = sigmoid_of(logit + bias);
      }
    }
  }

  // All columns of a tile, in `memory`.
  template <class T>
  const float* multiply_stretches(const Tile& tile, float* memory) {
    float* x = memory;
    float* dropout = x + tiles.tile_rows * kStretchStride;
    float* all = memory + (has_dropout(call) ? 2 : 1) * tiles.tile_rows * kStretchStride;
    const T* rows = static_cast<const T*>(call.x) + tile.row * call.Din;
    // First the groups that see x as it is, straight from memory; then those that see dropout(x).
    for (int64_t begin = 0; begin < call.Din; begin += kDotStretch) {
      const int64_t count = std::min(kDotStretch, call.Din - begin);
      multiply_groups(tile, begin, count, rows + begin, call.Din, all, /*dropped=*/false);
    }
    for (int64_t begin = 0; begin < call.Din && has_dropout(call); begin += kStretch) {
      const int64_t count = std::min(kStretch, call.Din - begin);
      // The stretch stays in the first cache for its factors and for all groups.
      read_stretch<T>(call.x, call.Din, tile, begin, count, x);
      read_dropout(call, tile, begin, count, dropout);
      multiply_stretch(tile, count, dropout, x);
      multiply_groups(tile, begin, count, x, kStretchStride, all, /*dropped=*/true);
    }
    return all;
  }

  // The same on tiles. Dropped rows are written whole: a tile product walks all of the depth.
  const float* multiply_pairs(const Tile& tile, float* memory) {
    float* all = memory;
    bf16* dropped = reinterpret_cast<bf16*>(all + tiles.tile_rows * columns.stride);
    const PairRows x = {static_cast<const bf16*>(call.x) + tile.row * call.Din, call.Din};
    const PairRows dropped_x = {dropped, pair_distance(call.Din)};
    // Factors for a stretch at a time, so that they need no memory of the workspace.
    for (int64_t r = 0; r < tile.rows && has_dropout(call); ++r) {
      alignas(64) float factor[kStretch];
      for (int64_t begin = 0; begin < call.Din; begin += kStretch) {
        const int64_t count = std::min(kStretch, call.Din - begin);
        read_dropout_row(call, tile.row + r, begin, count, factor);
        drop_row(x.data + r * x.stride + begin, factor, count,
                 dropped + r * dropped_x.stride + begin);
      }
    }
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      const bf16* panels = pair_weights.down[g].of(Weights::slot_of(call, group, tile.sentence));
      multiply_pairs_into(group.is_dropped ? dropped_x : x, panels, call.Din, tile.rows,
                          group.count, all + group.place, columns.stride, false);
    }
    return all;
  }

  // all = or += x times the columns of the groups that see it dropped, or as it is.
  template <class T>
  void multiply_groups(const Tile& tile, int64_t begin, int64_t count, const T* x, int64_t x_stride,
                       float* all, bool dropped) {
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      if (group.is_dropped != dropped) continue;
      const float* w = weights.down_of(call, columns, g, tile.sentence) + begin;
      multiply_dots(tile.rows, group.count, count, x, x_stride, {w, row_distance(call.Din)},
                    all + group.place, columns.stride, begin > 0);
    }
  }

  // Branches stand beside each other in s, without the gaps between groups.
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
  void pool(const Gate& gate, const float* of_rows) {
    for (int64_t b = 0; b < call.B; ++b) {
      double sum = 0.0;  // in the rows' order, whatever the tiles
      for (int64_t row = b * call.S; row < (b + 1) * call.S; ++row) {
        if (counts(call, gate, row)) sum += of_rows[row];
      }
      gate.value[b] = static_cast<float>(sum / divisor_of(call, gate, b));
    }
  }

  // ---- y += scale g s B^T ----

  template <class T>
  void project_up(const Tile& tile, float* memory) {
    if (by_pairs) return project_pairs_up(tile, memory);
    int64_t first = 0;  // of the branch's columns of s
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      const int64_t stride = row_distance(branch.size), distance = row_distance(branch.R);
      // scale g s as float32, from the s that was rounded for backward.
      read_scaled<T>(call, branch, tile, first, ranks, memory, distance);
      const float* b = weights.up_of(branch, i, tile.sentence);
      multiply_add_to(tile.rows, branch.size, branch.R, {memory, distance, 1}, {b, stride},
                      static_cast<T*>(call.y) + tile.row * call.Dout + branch.offset, call.Dout);
      first += branch.R;
    }
  }

  // The same on tiles.
  void project_pairs_up(const Tile& tile, float* memory) {
    float* factor = memory;
    bf16* s = reinterpret_cast<bf16*>(memory + tiles.tile_rows);
    int64_t first = 0;
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      const int64_t depth = pair_depth(branch.R), distance = pair_distance(branch.R);
      // s is multiplied as it was rounded; scale g, which needs float32, falls on the sums.
      for (int64_t r = 0; r < tile.rows; ++r) {
        const bf16* from = static_cast<const bf16*>(call.s) + (tile.row + r) * ranks + first;
        bf16* to = s + r * distance;
        std::copy(from, from + branch.R, to);
        std::fill(to + branch.R, to + depth, bf16{0});
        factor[r] = factor_of<bf16>(call, branch, tile.row + r);
      }
      bf16* y = static_cast<bf16*>(call.y) + tile.row * call.Dout + branch.offset;
      const int64_t rows = tile.rows, stride = call.Dout, size = branch.size;
      // The epilogue adds a block of sums to y while it is in registers.
      multiply_pairs_each(
          {s, distance}, pair_weights.up[i].of(b_bank(branch).slot_of(tile.sentence)), depth, rows,
          size, rows, [=](int64_t row, int64_t column, auto& sums) {
            bf16* to = y + row * stride + column;
            const float* of_row = factor + row;
            store_sums(sums, rows - row, size - column, to, stride,
                       [=](int64_t r, int64_t k, auto part, Vector sum) {
                         return part.load_from(to + r * stride + k) + of_row[r] * sum;
                       });
          });
      first += branch.R;
    }
  }
};

}  // namespace
}  // namespace pelt::lora_linear

namespace pelt {

using namespace lora_linear;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
std::string Kernels::why_not(const Call& call) {
  const int branches = call.R_i.count, gates = gate_count(call);
  if (branches > kMaxBranches || gates > kMaxGates) {
    return sentence("it takes at most ", kMaxBranches, " branches and ", kMaxGates,
                    " learned gates, and there are ", branches, " and ", gates);
  }
  const int64_t ranks = Linear::of(call).ranks, rows = call.B * call.S;
  if (call.dtype == DType::kF32 && ranks > kMostRanks) {
    return sentence("in float32 torch's own products are faster beyond ", kMostRanks,
                    " ranks in all, and there are ", ranks);
  }
  if (0 < rows && rows <= kFewRows && ranks * call.Din >= kLargeFactor) {
    return sentence("for ", rows,
                    " rows it would mostly copy factors of ΣR x Din = ", ranks * call.Din,
                    " numbers");
  }
  return "";
}

template <>
void Kernels::forward(const Call& call, Arena& arena) {
  cpu::run<Forward>(call, arena);
}

}  // namespace pelt
