// gated_adapter forward on the CPU:
//
//   h = W_down pre_norm(x) + b_down,  u = W_up phi(h) + b_up
//   y = residual + scale g dropout(post_norm(u))
//
// Rows are cut into tiles; a tile's x is read once, in stretches of kDepth columns that fit the
// first cache, converted to float32 (and normed) on the way, with the gate's logit summed up:
//
//   x [tile, D]  --pack-->  [tile, 256]  x  W_down panels [D, R]  -->  h [tile, R]   (stored)
//                 \-- . w_gate -> sigmoid
//   phi(h) [tile, R]  x  W_up panels [R, D]  -->  registers, + b_up, x scale g, + residual  --> y
//
// A pooled gate scales a sentence only when all its rows have been seen: then the first half runs
// over all tiles, and the second half, which needs h and the residual but not x, runs after it.
// With a post-norm or dropout a tile of u goes through memory, because a row is needed whole.
//
// On tiles (cpu/pairs.h) x is read where it lies, and phi(h) and float32 weights are rounded to
// bfloat16; elsewhere weights in float32 beside bfloat16 are used as they are.
//
// Each row is computed alone and every sum has one order, so bits depend neither on tiles nor on
// threads. Sums are float32.
#include "common/check.h"
#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "ops/gated_adapter/cpu_rows.h"

namespace pelt::gated_adapter {
namespace {

struct Forward {
  const Call& call;
  Tiles tiles;
  Parameters parameters;
  Weights down, up;        // packed once, read by every tile
  float* gates = nullptr;  // [B * S] of a learned gate, for each row

  // One for each thread.
  struct Scratch {
    float* x;          // [tile, kDepth], a stretch of columns
    float* h;          // [tile, rank_stride], before and after the activation
    bf16* normed;      // [tile, pair_distance(D)]: with pairs and a pre-norm, in the place of x
    bf16* a;           // [tile, pair_distance(R)]: with pairs phi(h), in the place of h
    float* logits;     // [tile, kWidth], sums in vectors
    Moments* moments;  // [tile], of x
    float* u;          // [tile, padded width], where a row is needed whole
  };
  float* scratch = nullptr;
  int64_t scratch_floats = 0;  // of one thread
  bool by_pairs;               // products take bfloat16 as it is, on tiles

  explicit Forward(const Call& c) : call(c), tiles(cut_evenly(c)), by_pairs(uses_pairs(c)) {}

  // A post-norm has to see a row before it scales it, and dropout draws for whole rows.
  bool needs_rows_whole() const { return has_post_norm(call) || has_dropout(call); }

  void place(Arena& arena) {
    parameters.place(call, arena);
    down = {kWDown, true, call.D, call.R};
    up = {kWUp, true, call.R, call.D};
    down.place(arena, parameters.down, by_pairs);
    up.place(arena, parameters.up, by_pairs);
    gates = arena.take(has_learned_gate(call) ? rows_of(call) : 0);
    const int64_t rows = tiles.tile_rows;
    // Of a row: x, h, a vector of the logit's sums, two moments, u.
    scratch_floats = rows * (x_floats() + h_floats() + kWidth + 2 +
                             (needs_rows_whole() ? padded_width(call) : 0));
    scratch_floats = round_up(scratch_floats, 16);  // threads share no cache line
    scratch = arena.take(scratch_floats * call.threads);
  }

  // Of a row of the tile's x and h; a pair of bfloat16 takes one.
  int64_t x_floats() const {
    if (!by_pairs) return kDepth;
    return has_pre_norm(call) ? pair_distance(call.D) / 2 : 0;
  }
  int64_t h_floats() const { return by_pairs ? pair_distance(call.R) / 2 : rank_stride(call); }

  Scratch scratch_of(int thread) const {
    const int64_t rows = tiles.tile_rows;
    float* x = scratch + thread * scratch_floats;
    float* h = x + rows * x_floats();
    float* logits = h + rows * h_floats();
    float* moments = logits + rows * kWidth;
    return {x,
            h,
            reinterpret_cast<bf16*>(x),
            reinterpret_cast<bf16*>(h),
            logits,
            reinterpret_cast<Moments*>(moments),
            moments + 2 * rows};
  }

  template <class T>
  void run() {
    prefer_huge_pages(call.output[kY], rows_of(call) * call.D * static_cast<int64_t>(sizeof(T)));
    parameters.read<T>(call);
    // A panel of either weight for each task.
    const int64_t down_tasks = parameters.down.slots * down.panels_per_slot(by_pairs);
    const int64_t up_tasks = parameters.up.slots * up.panels_per_slot(by_pairs);
    parallel_for(down_tasks + up_tasks, pack_threads(call), [&](int64_t task) {
      if (task < down_tasks) {
        down.pack<T>(call, parameters.down, task);
      } else {
        up.pack<T>(call, parameters.up, task - down_tasks);
      }
    });
    if (has_skip(call) && has_learned_gate(call)) {
      // Which rows need no work is known only when the gates are.
      parallel_for(rows_of(call), call.threads, [&](int64_t row) {
        const T* x = call.input_as<T>(kX) + row * call.D;
        gates[row] = sigmoid_of(dot_of(x, parameters.gate_weight, call.D) + parameters.gate_bias);
      });
      pool_gates(call, gates);
    }
    if (has_pooled_gate(call) && !has_skip(call)) {
      // Two passes over the tiles: a sentence's gate needs all of its rows.
      parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
        const TileScope scope;
        project_down<T>(tiles.at(i), scratch_of(thread));
      });
      pool_gates(call, gates);
      parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
        const TileScope scope;
        project_up<T>(tiles.at(i), scratch_of(thread));
      });
      return;
    }
    parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
      const Tile tile = tiles.at(i);
      if (skip_tile<T>(tile)) return;
      // Both halves while h and x are in the caches.
      const TileScope scope;
      project_down<T>(tile, scratch_of(thread));
      if (has_learned_gate(call) && !has_skip(call)) {
        // A gate of each row is its own value.
        std::copy(gates + tile.row, gates + tile.row + tile.rows,
                  call.output_as<float>(kGateValue) + tile.row);
      }
      project_up<T>(tile, scratch_of(thread));
    });
  }

  template <class T>
  bool is_skipped(int64_t row) const {
    return has_skip(call) && gate_of<T>(call, row) < call.skip_below;
  }

  // True if every row keeps its residual: then that is all that happens to the tile.
  template <class T>
  bool skip_tile(const Tile& tile) {
    if (!has_skip(call)) return false;
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (!is_skipped<T>(tile.row + r)) return false;
    }
    // h is an output, and no output leaves undefined.
    T* h = call.output_as<T>(kH) + tile.row * call.R;
    std::memset(h, 0, static_cast<size_t>(tile.rows * call.R) * sizeof(T));
    for (int64_t r = 0; r < tile.rows; ++r) copy_residual<T>(tile.row + r);
    return true;
  }

  // What u is added to; null where it is nothing.
  template <class T>
  const T* residual() const {
    if (call.residual_from == ResidualFrom::kNone) return nullptr;
    const int which = call.residual_from == ResidualFrom::kInput ? kX : kResidual;
    return static_cast<const T*>(call.input[which]);
  }

  // y = residual of a row that is skipped.
  template <class T>
  void copy_residual(int64_t row) {
    T* y = call.output_as<T>(kY) + row * call.D;
    const size_t bytes = static_cast<size_t>(call.D) * sizeof(T);
    if (residual<T>() == nullptr) {
      std::memset(y, 0, bytes);
    } else {
      std::memcpy(y, residual<T>() + row * call.D, bytes);
    }
  }

  // ---- h = W_down pre_norm(x) + b_down, and the rows' gates ----

  template <class T>
  void project_down(const Tile& tile, const Scratch& s) {
    const bool wants_gates = has_learned_gate(call) && !has_skip(call);
    const T* x = call.input_as<T>(kX) + tile.row * call.D;
    // Statistics first: the stretches of a row are normed one by one.
    for (int64_t r = 0; has_pre_norm(call) && r < tile.rows; ++r) {
      s.moments[r] = moments_of(x + r * call.D, call.D, call.pre_norm_eps);
    }
    std::fill(s.logits, s.logits + tile.rows * kWidth, 0.0f);  // summed over the stretches
    if (by_pairs) {
      project_pairs_down(tile, s);
    } else {
      project_stretches_down<T>(tile, s);
    }
    for (int64_t r = 0; wants_gates && r < tile.rows; ++r) {
      gates[tile.row + r] = sigmoid_of(sum_of(load(s.logits + r * kWidth)) + parameters.gate_bias);
    }
  }

  // kDepth columns of all the tile's rows at a time, whose sums grow in s.h.
  template <class T>
  void project_stretches_down(const Tile& tile, const Scratch& s) {
    const bool wants_gates = has_learned_gate(call) && !has_skip(call);
    const T* x = call.input_as<T>(kX) + tile.row * call.D;
    const int64_t rank = padded_rank(call), stride = rank_stride(call);
    const int64_t slot = parameters.down.slot_of(tile.sentence);
    const float* panels = down.of(slot);
    for (int64_t begin = 0; begin < call.D; begin += kDepth) {
      const int64_t depth = std::min(kDepth, call.D - begin);
      for (int64_t r = 0; r < tile.rows; ++r) {
        const T* from = x + r * call.D + begin;
        if (wants_gates) {
          pack_row<true>(from, slot, begin, depth, s, r);
        } else {
          pack_row<false>(from, slot, begin, depth, s, r);
        }
      }
      // The product asks for the next stretch while it computes.
      const int64_t next = begin + depth, bytes = sizeof(T);
      const Ahead ahead(x + next, call.D * bytes, tile.rows,
                        std::min(kDepth, call.D - next) * bytes, blocks_of(tile.rows, rank));
      multiply_into(s.x, kDepth, 1, {panels, call.D, begin, depth}, s.h, stride, tile.padded, rank,
                    begin > 0, next < call.D ? ahead : Ahead());
    }
    // h is rounded to the activation's type here; project_up reads it back, as backward will.
    const float* bias = parameters.b_down + slot * rank;
    T* h = call.output_as<T>(kH) + tile.row * call.R;
    for (int64_t r = 0; r < tile.rows; ++r) {
      for_vectors(call.R, [&](int64_t i, auto part) {
        part.store_to(h + r * call.R + i, load(s.h + r * stride + i) + load(bias + i));
      });
    }
  }

  // A few rows at a time, so that they are in the first cache when they are multiplied.
  void project_pairs_down(const Tile& tile, const Scratch& s) {
    const bool wants_gates = has_learned_gate(call) && !has_skip(call);
    const bf16* x = call.input_as<bf16>(kX) + tile.row * call.D;
    const int64_t slot = parameters.down.slot_of(tile.sentence), rank = call.R;
    const float* bias = parameters.b_down + slot * padded_rank(call);
    const float* norm_weight = parameters.pre_norm.weight_of(slot);
    const float* norm_bias = parameters.pre_norm.bias_of(slot);
    bf16* h = call.output_as<bf16>(kH) + tile.row * rank;
    PairRows rows = {x, call.D};
    if (has_pre_norm(call)) rows = {s.normed, pair_distance(call.D)};  // else x where it lies
    for (int64_t first = 0; first < tile.rows; first += kPairBlockRows) {
      const int64_t count = std::min(kPairBlockRows, tile.rows - first);
      for (int64_t r = first; r < first + count; ++r) {
        const bf16* from = x + r * call.D;
        if (wants_gates) {  // in float32: a gate's weight is not rounded
          store(s.logits + r * kWidth,
                dots_of(from, parameters.gate_weight, call.D, [](int64_t, Vector) {}));
        }
        if (!has_pre_norm(call)) continue;
        const Moments m = s.moments[r];
        for_vectors(call.D, [&](int64_t i, auto part) {
          part.store_to(s.normed + r * rows.stride + i,
                        (part.load_from(from + i) - m.mean) * m.rstd * load(norm_weight + i) +
                            load(norm_bias + i));
        });
      }
      // Straight from the registers of the product into h.
      const PairRows block = {rows.data + first * rows.stride, rows.stride};
      bf16* to = h + first * rank;
      multiply_pairs_each(block, down.pairs_of(slot), call.D, count, rank, kPairBlockRows,
                          [=](int64_t row, int64_t column, auto& sums) {
                            const float* of_column = bias + column;
                            store_sums(sums, count - row, rank - column, to + row * rank + column,
                                       rank, [=](int64_t, int64_t i, auto part, Vector sum) {
                                         return sum + part.load_from(of_column + i);
                                       });
                          });
    }
  }

  // A stretch of one row into s.x, in float32 and normed, and its part of the row's logit. The gate
  // sees x before the norm. Compiled for each of both: a branch in the loop would cost more.
  template <bool kWantsGate, class T>
  void pack_row(const T* from, int64_t slot, int64_t begin, int64_t depth, const Scratch& s,
                int64_t r) {
    float* to = s.x + r * kDepth;
    const float* weight = parameters.gate_weight + begin;
    Moments m = {0.0f, 1.0f};  // what leaves x as it is
    if (has_pre_norm(call)) m = s.moments[r];
    const float* scale = parameters.pre_norm.weight_of(slot) + begin;
    const float* shift = parameters.pre_norm.bias_of(slot) + begin;
    const bool has_norm = has_pre_norm(call);
    auto take = [=](int64_t i, Vector x) {
      store(to + i, has_norm ? (x - m.mean) * m.rstd * load(scale + i) + load(shift + i) : x);
    };
    if (kWantsGate) {
      float* logits = s.logits + r * kWidth;
      store(logits, load(logits) + dots_of(from, weight, depth, take));
    } else {
      for_vectors(depth, [&](int64_t i, auto part) { take(i, part.load_from(from + i)); });
    }
  }

  // ---- y = residual + scale g dropout(post_norm(W_up phi(h) + b_up)) ----

  // From h in memory, of whichever tile: with a pooled gate it comes long after project_down.
  template <class T>
  void project_up(const Tile& tile, const Scratch& s) {
    if (by_pairs) {
      activate_rows<T>(tile, s.a, pair_distance(call.R), pair_depth(call.R));
    } else {
      activate_rows<T>(tile, s.h, rank_stride(call), call.R);
    }
    // The residual is compiled in or out: a branch in the loop over columns would cost more.
    if (needs_rows_whole()) {
      finish_rows<T>(tile, s);
    } else if (residual<T>() != nullptr) {
      finish_vectors<true, T>(tile, s);
    } else {
      finish_vectors<false, T>(tile, s);
    }
    // Skipped rows among others were computed with them; what that gave, NaN or not, goes.
    for (int64_t r = 0; has_skip(call) && r < tile.rows; ++r) {
      if (is_skipped<T>(tile.row + r)) copy_residual<T>(tile.row + r);
    }
  }

  // to [tile, stride] = phi(h), with zeros from R to `width`.
  template <class T, class To>
  void activate_rows(const Tile& tile, To* to, int64_t stride, int64_t width) {
    const T* h = call.output_as<const T>(kH) + tile.row * call.R;
    with_activation(call.activation, [&](auto activation) {
      for (int64_t r = 0; r < tile.rows; ++r, to += stride) {
        // phi of h as it was rounded: backward, which reads it, has the same.
        for_vectors(call.R, [&](int64_t i, auto part) {
          part.store_to(to + i,
                        activate<decltype(activation)::value>(part.load_from(h + r * call.R + i)));
        });
        for (int64_t i = call.R; i < width; ++i) to[i] = To{};  // a product takes whole pairs
      }
    });
  }

  // u - b_up = W_up phi(h), in blocks for finish(row, column, sums).
  template <class Finish>
  void multiply_up(const Tile& tile, const Scratch& s, int64_t slot, Finish&& finish) {
    if (by_pairs) {
      multiply_pairs_each({s.a, pair_distance(call.R)}, up.pairs_of(slot), pair_depth(call.R),
                          tile.rows, call.D, tile.padded, finish);
    } else {
      multiply_each(s.h, rank_stride(call), up.of(slot), call.R, tile.padded, padded_width(call),
                    finish);
    }
  }

  // Straight from the registers of the product.
  template <bool kHasResidual, class T>
  void finish_vectors(const Tile& tile, const Scratch& s) {
    const int64_t slot = parameters.up.slot_of(tile.sentence), width = call.D;
    const float* bias = parameters.b_up + slot * padded_width(call);
    const T* residual = kHasResidual ? this->residual<T>() + tile.row * width : nullptr;
    T* y = call.output_as<T>(kY) + tile.row * width;
    float* factor = s.logits;  // its sums have become gates
    // Once for each row, not for each block of columns.
    for (int64_t r = 0; r < tile.rows; ++r) {
      factor[r] = parameters.scale * gate_of<T>(call, tile.row + r);
    }
    // Nothing is fetched ahead: the processor finds these rows by itself, and whatever the
    // distance, asking for them made it slower (by up to a fifth at D = 4096, EPYC Zen 3).
    auto finish = [=](int64_t row, int64_t column, auto& sums) __attribute__((always_inline)) {
      const int64_t place = row * width + column, stride = width;
      const T* from = residual + place;
      const float *of_row = factor + row, *of_column = bias + column;
      store_sums(sums, tile.rows - row, width - column, y + place, stride,
                 [=](int64_t r, int64_t i, auto part, Vector sum) {
                   // One rounding, at the store: sum, bias, factor and residual are float32.
                   const Vector u = of_row[r] * (sum + load(of_column + i));
                   return kHasResidual ? part.load_from(from + r * stride + i) + u : u;
                 });
    };
    multiply_up(tile, s, slot, finish);
  }

  // By way of u [tile, width], for what needs a row whole.
  template <class T>
  void finish_rows(const Tile& tile, const Scratch& s) {
    const int64_t slot = parameters.up.slot_of(tile.sentence), width = padded_width(call);
    const float* bias = parameters.b_up + slot * width;
    const float* norm_weight = parameters.post_norm.weight_of(slot);
    const float* norm_bias = parameters.post_norm.bias_of(slot);
    multiply_up(tile, s, slot, [=](int64_t row, int64_t column, auto& sums) {
      store_sums(
          sums, tile.padded - row, width - column, s.u + row * width + column, width,
          [=](int64_t, int64_t i, auto, Vector sum) { return sum + load(bias + column + i); });
    });
    for (int64_t r = 0; r < tile.rows; ++r) {  // in the order of the formula
      const int64_t row = tile.row + r;
      float* u = s.u + r * width;
      if (has_post_norm(call)) {
        const Moments m = moments_of(u, call.D, call.post_norm_eps);
        for (int64_t i = 0; i < width; i += kWidth) {
          store(u + i,
                (load(u + i) - m.mean) * m.rstd * load(norm_weight + i) + load(norm_bias + i));
        }
      }
      // Drawn from the elements' indices: backward draws the same factors again.
      if (has_dropout(call)) apply_dropout(call, row, 0, call.D, u);
      const float factor = parameters.scale * gate_of<T>(call, row);
      const T* residual = this->residual<T>();
      T* y = call.output_as<T>(kY) + row * call.D;
      for_vectors(call.D, [&](int64_t i, auto part) {
        const Vector scaled = factor * load(u + i);
        part.store_to(y + i, residual == nullptr
                                 ? scaled
                                 : part.load_from(residual + row * call.D + i) + scaled);
      });
    }
  }
};

}  // namespace

}  // namespace pelt::gated_adapter

namespace pelt {

using namespace gated_adapter;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
std::string Kernels::why_not(const Call& call) {
  constexpr int64_t kMaxRank = 1024;
  if (call.R > kMaxRank) {
    return sentence("its tiles hold a bottleneck of at most ", kMaxRank, ", and R is ", call.R);
  }
  // Eager reads the weights as they lie: one row at D = 4096, R = 64 takes it 0.7 of the time.
  constexpr int64_t kFewRows = 2, kLargeWeight = 1 << 17;
  const int64_t rows = rows_of(call), weight = call.D * call.R;
  if (0 < rows && rows <= kFewRows && weight >= kLargeWeight) {
    return sentence("for ", rows, " rows it would mostly pack weights of D x R = ", weight,
                    " numbers");
  }
  return "";
}

template <>
void Kernels::forward(const Call& call, Arena& arena) {
  cpu::run<Forward>(call, arena);
}

}  // namespace pelt
