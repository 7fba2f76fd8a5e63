// gated_adapter backward on the CPU, from x, h and the gate's value. With dropped = dropout(dy),
// a = phi(h), f = scale g and du the gradient of u = W_up a + b_up (f dropped, if there is no
// post-norm):
//
//   da = du W_up          dh = da phi'(h)          dx = dh W_down + dlogit w_gate + dy
//   dW_up = du^T a        dW_down = dh^T x         dgate = sum over rows of <dropped, u>
//
// The last needs no up projection again: <dropped, u> = <dropped W_up, a> + <dropped, b_up>.
//
//   rows:     dy tile -> da -> dh and f a, [B * S, R] in memory; each row's dot and gate's logit
//   gates:    dgate, dscale, dlogit: sums over what the rows left
//   rest:     tiles of dx; and columns of the weights' gradients,
//
//                G [R, columns] = sum over all rows of S [rows, R]^T X [rows, columns]
//
//             with S = dh, X = x for dW_down and S = f a, X = dropped for the transpose of dW_up.
//             A thread owns columns and passes by all rows in order, in stretches of kRowsAtOnce
//             that it packs once. No partial sums of weights exist, and threads do not matter.
//
// A pre-norm: G = dh^T xhat, from which dW_down and the norm's gradients follow without another
// pass, since the gradient of xhat's affine image is dh W_down. A post-norm: u is made again, du
// goes through memory, and its parameters' gradients are summed by tiles of a fixed cut.
#include "ops/gated_adapter/cpu_rows.h"

namespace pelt::gated_adapter {
namespace {

// A block of X, its rows of S and its sums stay in the first cache; at 128 x 128 they did not, and
// backward took 13 % longer (T = 1024, D = 768, R = 48, EPYC Zen 3).
constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kColumnsAtOnce = 64;

struct Backward {
  const CpuCall& call;
  Tiles tiles;
  Parameters parameters;
  Weights up;               // for da
  Weights down;             // for dx
  Weights up_again;         // for u, with a post-norm
  float* dh = nullptr;      // [B * S + kRowUnit, rank_stride]
  float* fa = nullptr;      // the same: f a; a alone with a post-norm
  float* du = nullptr;      // [B * S, padded width], with a post-norm
  float* factor = nullptr;  // [B * S]: f; 1 with a post-norm
  float* dot = nullptr;     // [B * S]: <dropped, post_norm(u)>
  float* logit = nullptr;   // [B * S] of a learned gate: the row's gate, then its logit's gradient
  Moments* moments = nullptr;     // [B * S] of x, with a pre-norm
  float* post_partial = nullptr;  // [tiles, 2, padded width]: weight, bias
  float* column_sums = nullptr;   // [slots, 3, padded width]: gate_weight, pre_norm_weight and bias
  float* scratch = nullptr;
  int64_t scratch_floats = 0;

  // A post-norm's sums over a tile's rows must not depend on the number of threads.
  explicit Backward(const CpuCall& c)
      : call(c), tiles(has_post_norm(c) ? cut_by(c, 24, 1) : cut_evenly(c)) {}

  int64_t width() const { return padded_width(call); }
  int64_t stride() const { return rank_stride(call); }

  int64_t place(Arena arena) {
    const int64_t rows = rows_of(call), some = rows + kRowUnit;
    parameters.place(call, arena);
    up = {kWUp, false, call.D, call.R, nullptr};
    down = {kWDown, false, call.R, call.D, nullptr};
    up_again = {kWUp, true, call.R, call.D, nullptr};
    up.place(arena, parameters.up);
    down.place(arena, parameters.down);
    if (has_post_norm(call)) up_again.place(arena, parameters.up);
    dh = arena.floats(some * stride());
    fa = arena.floats(some * stride());
    du = arena.floats(has_post_norm(call) ? rows * width() : 0);
    factor = arena.floats(rows);
    dot = arena.floats(rows);
    logit = arena.floats(rows);
    moments = reinterpret_cast<Moments*>(arena.floats(has_pre_norm(call) ? 2 * rows : 0));
    post_partial = arena.floats(has_post_norm(call) ? tiles.count() * 2 * width() : 0);
    column_sums = arena.floats(parameters.down.slots * 3 * width());
    const int64_t whole = has_pre_norm(call) || has_post_norm(call) ? width() : 0;
    const int64_t of_rows = tiles.tile_rows * (kDepth + stride() + 1 + whole) + 2 * whole;
    const int64_t of_weights =
        kColumnsAtOnce * (kRowsAtOnce + 2) + round_up(call.R, kRowUnit) * (kColumnsAtOnce + 1);
    scratch_floats = round_up(std::max(of_rows, of_weights) + 64, 16);
    scratch = arena.floats(scratch_floats * call.threads);
    return arena.used;
  }

  template <class T>
  void run() {
    prefer_huge_pages(call.grad[kX], rows_of(call) * call.D * static_cast<int64_t>(sizeof(T)));
    parameters.read<T>(call);
    clear_unused_members<T>(call);
    pack<T>();
    parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
      rows_backward<T>(i, scratch + thread * scratch_floats);
    });
    gates_backward<T>();

    const int64_t blocks = (width() + kColumnsAtOnce - 1) / kColumnsAtOnce;
    const int64_t down_tasks = wants_down() ? parameters.down.slots * blocks : 0;
    const int64_t up_tasks = call.grad[kWUp] || call.grad[kBUp] ? parameters.up.slots * blocks : 0;
    const int64_t tile_tasks = call.grad[kX] ? tiles.count() : 0;
    parallel_for_on(down_tasks + up_tasks + tile_tasks, call.threads, [&](int64_t i, int thread) {
      float* memory = scratch + thread * scratch_floats;
      if (i < down_tasks) {
        down_backward<T>(i / blocks, i % blocks * kColumnsAtOnce, memory);
      } else if ((i -= down_tasks) < up_tasks) {
        up_backward<T>(i / blocks, i % blocks * kColumnsAtOnce, memory);
      } else {
        x_backward<T>(tiles.at(i - up_tasks), memory);
      }
    });
    column_sums_backward<T>();
  }

  bool wants_down() const {
    return call.grad[kWDown] || call.grad[kBDown] || call.grad[kGateWeight] ||
           call.grad[kPreNormWeight] || call.grad[kPreNormBias];
  }

  template <class T>
  void pack() {
    const int64_t a = parameters.up.slots * up.panels_per_slot();
    const int64_t b = call.grad[kX] ? parameters.down.slots * down.panels_per_slot() : 0;
    const int64_t c = has_post_norm(call) ? parameters.up.slots * up_again.panels_per_slot() : 0;
    parallel_for(a + b + c, pack_threads(call), [&](int64_t i) {
      if (i < a) {
        up.pack<T>(call, parameters.up, i);
      } else if (i < a + b) {
        down.pack<T>(call, parameters.down, i - a);
      } else {
        up_again.pack<T>(call, parameters.up, i - a - b);
      }
    });
  }

  // ---- rows: dh and f a, dots and logits ----

  template <class T>
  void rows_backward(int64_t i, float* memory) {
    const Tile tile = tiles.at(i);
    float* da = memory;                                    // [tile, stride]
    float* stretch = da + tiles.tile_rows * stride();      // [tile, kDepth]
    float* bias_dot = stretch + tiles.tile_rows * kDepth;  // [tile]
    float* u = bias_dot + round_up(tiles.tile_rows, 16);   // [tile, width], with a post-norm
    const T* x = static_cast<const T*>(call.input[kX]) + tile.row * call.D;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      factor[row] = has_post_norm(call) ? 1.0f : parameters.scale * gate_of<T>(call, row);
      bias_dot[r] = 0.0f;
      if (has_learned_gate(call)) {
        logit[row] = sigmoid_of(dot_of(x + r * call.D, parameters.gate_weight, call.D) +
                                parameters.gate_bias);
      }
      if (has_pre_norm(call)) {
        moments[row] = moments_of(x + r * call.D, call.D, call.pre_norm_eps);
      }
    }
    activate_rows<T>(tile);
    if (has_post_norm(call)) post_norm_backward<T>(i, tile, u);

    const int64_t slot = parameters.up.slot_of(tile.sentence);
    const float* bias = parameters.b_up + slot * width();
    const bool wants_dot = needs_dot() && !has_post_norm(call);
    for (int64_t begin = 0; begin < call.D; begin += kDepth) {
      const int64_t depth = std::min(kDepth, call.D - begin);
      for (int64_t r = 0; r < tile.rows; ++r) {
        float* to = stretch + r * kDepth;
        read_du<T>(tile.row + r, begin, depth, to);
        if (wants_dot) bias_dot[r] += dot_of(to, bias + begin, depth);
      }
      const int64_t next = begin + depth, bytes = sizeof(T);
      const Ahead ahead(static_cast<const T*>(call.dy) + tile.row * call.D + next, call.D * bytes,
                        tile.rows, std::min(kDepth, call.D - next) * bytes,
                        blocks_of(tile.rows, padded_rank(call)));
      multiply_into(stretch, kDepth, 1, {up.of(slot), call.D, begin, depth}, da, stride(),
                    tile.padded, padded_rank(call), begin > 0, next < call.D ? ahead : Ahead());
    }
    const T* h = static_cast<const T*>(call.h) + tile.row * call.R;
    with_activation(call.activation, [&](auto activation) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = tile.row + r;
        Vector sum = {};
        for_vectors(call.R, [&](int64_t j, auto part) {
          const int64_t place = row * stride() + j;
          const Vector a = load(fa + place), d = load(da + r * stride() + j);
          const Vector slope =
              activation_slope<decltype(activation)::value>(part.load_from(h + r * call.R + j));
          sum += a * d;
          store(fa + place, factor[row] * a);
          store(dh + place, factor[row] * (d * slope));
        });
        if (!has_post_norm(call)) dot[row] = sum_of(sum) + bias_dot[r];
      }
    });
  }

  bool needs_dot() const { return call.grad[kScale] || call.grad[kGate] || has_learned_gate(call); }

  template <class T>
  void activate_rows(const Tile& tile) {
    const T* h = static_cast<const T*>(call.h) + tile.row * call.R;
    with_activation(call.activation, [&](auto activation) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        for_vectors(call.R, [&](int64_t j, auto part) {
          store(fa + (tile.row + r) * stride() + j,
                activate<decltype(activation)::value>(part.load_from(h + r * call.R + j)));
        });
      }
    });
  }

  // dropped, or du where it is in memory: columns [begin, begin + count) of a row.
  template <class T>
  void read_du(int64_t row, int64_t begin, int64_t count, float* to) {
    if (has_post_norm(call)) {
      std::memcpy(to, du + row * width() + begin, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    const T* dy = static_cast<const T*>(call.dy) + row * call.D + begin;
    for_vectors(count, [&](int64_t i, auto part) { store(to + i, part.load_from(dy + i)); });
    if (has_dropout(call)) apply_dropout(call, row, begin, count, to);
  }

  // du of a tile from u made again, and the tile's part of the norm's own gradients.
  template <class T>
  void post_norm_backward(int64_t i, const Tile& tile, float* u) {
    const int64_t slot = parameters.up.slot_of(tile.sentence);
    const float* bias = parameters.b_up + slot * width();
    const float *weight = parameters.post_weight, *shift = parameters.post_bias;
    multiply_each(fa + tile.row * stride(), stride(), up_again.of(slot), call.R, tile.padded,
                  width(), [&](int64_t row, int64_t column, auto& sums) {
                    for_sums(sums, [&](int r, int j, Vector& sum) {
                      store(u + (row + r) * width() + column + j, sum + load(bias + column + j));
                    });
                  });
    float* dweight = post_partial + i * 2 * width();
    float* dbias = dweight + width();
    std::memset(dweight, 0, static_cast<size_t>(2 * width()) * sizeof(float));
    float* dropped = u + tiles.tile_rows * width();  // [width]
    std::memset(dropped, 0, static_cast<size_t>(width()) * sizeof(float));
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const float f = parameters.scale * gate_of<T>(call, row);
      const T* dy = static_cast<const T*>(call.dy) + row * call.D;
      for_vectors(call.D,
                  [&](int64_t j, auto part) { store(dropped + j, part.load_from(dy + j)); });
      if (has_dropout(call)) apply_dropout(call, row, 0, call.D, dropped);
      float* u_row = u + r * width();
      const Moments m = moments_of(u_row, call.D, call.post_norm_eps);
      Vector row_dot = {}, sum = {}, sum_hat = {};
      for (int64_t j = 0; j < width(); j += kWidth) {
        const Vector hat = (load(u_row + j) - m.mean) * m.rstd, d = load(dropped + j);
        row_dot += d * (hat * load(weight + j) + load(shift + j));
        const Vector dnorm = f * d;
        store(dweight + j, load(dweight + j) + dnorm * hat);
        store(dbias + j, load(dbias + j) + dnorm);
        const Vector dhat = dnorm * load(weight + j);
        sum += dhat;
        sum_hat += dhat * hat;
        store(u_row + j, hat);
        store(dropped + j, dhat);
      }
      dot[row] = sum_of(row_dot);
      const float n = static_cast<float>(call.D);
      const float mean = sum_of(sum) / n, mean_hat = sum_of(sum_hat) / n;
      for (int64_t j = 0; j < width(); j += kWidth) {
        store(du + row * width() + j,
              m.rstd * (load(dropped + j) - mean - mean_hat * load(u_row + j)));
      }
    }
  }

  // ---- gates: sums over what the rows left, in their order ----

  template <class T>
  void gates_backward() {
    if (!needs_dot()) return;
    const bool has_gate = has_learned_gate(call) || call.input[kGate];
    double dscale = 0.0, dgate_bias = 0.0;
    for (int64_t b = 0; b < call.B; ++b) {
      const int64_t begin = b * call.S, end = begin + call.S;
      double sum = 0.0;
      for (int64_t row = begin; row < end; ++row) {
        sum += dot[row];
        dscale += static_cast<double>(dot[row]) * (has_gate ? gate_of<T>(call, row) : 1.0f);
      }
      if (has_learned_gate(call)) {
        const int64_t counted = counted_rows(call, b);
        for (int64_t row = begin; row < end; ++row) {
          const double s = logit[row], dgate = has_pooled_gate(call) ? sum : dot[row];
          const double share = share_of(call, row, counted);
          // A row that does not count has no part in a gate that may be infinite.
          const double dlogit =
              share == 0.0 ? 0.0 : parameters.scale * dgate * share * s * (1.0 - s);
          logit[row] = static_cast<float>(dlogit);
          dgate_bias += dlogit;
        }
      } else if (call.grad[kGate]) {
        with_grad<T>(call, kGate, [&](auto* grad) {
          for (int64_t row = begin; call.has_gate_per_row && row < end; ++row) {
            store_part(grad + row, splat(parameters.scale * dot[row]), 1);
          }
          if (!call.has_gate_per_row) {
            store_part(grad + b, splat(parameters.scale * static_cast<float>(sum)), 1);
          }
        });
      }
    }
    write_scalar<T>(kScale, dscale * call.scale_value);
    write_scalar<T>(kGateBias, dgate_bias);
  }

  template <class T>
  void write_scalar(int which, double value) {
    if (call.grad[which] == nullptr) return;
    with_grad<T>(call, which,
                 [&](auto* grad) { store_part(grad, splat(static_cast<float>(value)), 1); });
  }

  // ---- dx = dh W_down through the pre-norm, + dlogit w_gate + dy ----

  template <class T>
  void x_backward(const Tile& tile, float* memory) {
    const int64_t slot = parameters.down.slot_of(tile.sentence);
    const bool has_gate = has_learned_gate(call);
    const bool has_residual = call.residual_from == CpuResidual::kInput;
    const float* d = dh + tile.row * stride();
    const T* dy = static_cast<const T*>(call.dy);
    T* dx = static_cast<T*>(call.grad[kX]) + tile.row * call.D;
    if (!has_pre_norm(call)) {
      const float* panels = down.of(slot);
      if (has_residual && has_gate) return product_dx<true, true>(tile, d, panels, dx);
      if (has_residual) return product_dx<true, false>(tile, d, panels, dx);
      if (has_gate) return product_dx<false, true>(tile, d, panels, dx);
      return product_dx<false, false>(tile, d, panels, dx);
    }
    float* dz = memory;  // [tile, width]
    multiply_each(d, stride(), down.of(slot), call.R, tile.padded, width(),
                  [&](int64_t row, int64_t column, auto& sums) {
                    for_sums(sums, [&](int r, int j, Vector& sum) {
                      store(dz + (row + r) * width() + column + j,
                            sum * load(parameters.pre_weight + column + j));
                    });
                  });
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const T* x = static_cast<const T*>(call.input[kX]) + row * call.D;
      const float* dhat = dz + r * width();
      const Moments m = moments[row];
      Vector sum = {}, sum_hat = {};
      for_vectors(call.D, [&](int64_t j, auto part) {
        sum += load(dhat + j);
        sum_hat += load(dhat + j) * ((part.load_from(x + j) - m.mean) * m.rstd);
      });
      const float n = static_cast<float>(call.D);
      const float mean = sum_of(sum) / n, mean_hat = sum_of(sum_hat) / n;
      for_vectors(call.D, [&](int64_t j, auto part) {
        const Vector hat = (part.load_from(x + j) - m.mean) * m.rstd;
        Vector through = m.rstd * (load(dhat + j) - mean - mean_hat * hat);
        if (has_residual) through += part.load_from(dy + row * call.D + j);
        if (has_gate) through += logit[row] * load(parameters.gate_weight + j);
        part.store_to(dx + r * call.D + j, through);
      });
    }
  }

  // Straight from the registers of the product.
  template <bool kHasResidual, bool kHasGate, class T>
  void product_dx(const Tile& tile, const float* d, const float* panels, T* dx) {
    const int64_t width = call.D;
    const T* dy = static_cast<const T*>(call.dy) + tile.row * width;
    const float *logits = logit + tile.row, *gate_weight = parameters.gate_weight;
    auto finish = [=](int64_t row, int64_t column, auto& sums) __attribute__((always_inline)) {
      const int64_t place = row * width + column, stride = width;
      const T* from = dy + place;
      const float *of_row = logits + row, *of_column = gate_weight + column;
      store_sums(sums, tile.rows - row, width - column, dx + place, stride,
                 [=](int64_t r, int64_t i, auto part, Vector sum) {
                   if (kHasResidual) sum += part.load_from(from + r * stride + i);
                   if (kHasGate) sum += of_row[r] * load(of_column + i);
                   return sum;
                 });
    };
    multiply_each(d, stride(), panels, call.R, tile.padded, padded_width(call), finish);
  }

  // ---- the weights' gradients, a thread's columns of them ----

  // G [R, columns] of the rows of one slot. pack(row, place in the panels, panels) reads X, which
  // comes from the rows of `x`; `sums` [kColumnsAtOnce] gathers sum over rows of weight[row]
  // X[row].
  template <class T, class Pack>
  bool sum_over_rows(const Bank& bank, int64_t slot, const float* s, int64_t columns,
                     const float* weight, float* panels, float* g, float* sums, const T* x,
                     Pack&& pack) {
    const int64_t padded = round_up(columns, kWidth);
    std::memset(sums, 0, static_cast<size_t>(kColumnsAtOnce) * sizeof(float));
    bool is_first = true;
    const int64_t groups = bank.index ? call.B : 1, group_rows = rows_of(call) / groups;
    for (int64_t group = 0; group < groups; ++group) {
      if (bank.slot_of(group) != slot) continue;
      const int64_t end = (group + 1) * group_rows;
      for (int64_t begin = group * group_rows; begin < end; begin += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, end - begin);
        for (int64_t r = 0; r < rows; ++r) pack(begin + r, r, panels);
        if (g != nullptr) {
          const int64_t next = std::min(kRowsAtOnce, end - begin - rows), bytes = sizeof(T);
          const Ahead ahead(x + (begin + rows) * call.D, call.D * bytes, next, columns * bytes,
                            blocks_of(round_up(call.R, kRowUnit), padded));
          multiply_into(s + begin * stride(), 1, stride(), {panels, kRowsAtOnce, 0, rows}, g,
                        kColumnsAtOnce, round_up(call.R, kRowUnit), padded, !is_first, ahead);
        }
        if (weight != nullptr) {
          for (int64_t column = 0; column < padded; column += kPanel) {
            add_weighted_rows(panels + column * kRowsAtOnce, weight + begin, rows,
                              std::min<int64_t>(kPanel, padded - column), sums + column);
          }
        }
        is_first = false;
      }
    }
    return !is_first;
  }

  template <class T>
  void up_backward(int64_t slot, int64_t column, float* memory) {
    const int64_t columns = std::min(kColumnsAtOnce, call.D - column);
    float* panels = memory;  // [kRowsAtOnce, columns]
    float* sums = panels + kRowsAtOnce * kColumnsAtOnce;
    float* row = sums + kColumnsAtOnce;
    float* g = row + kColumnsAtOnce;  // [R, columns]: the transpose of dW_up
    const T* dy = static_cast<const T*>(call.dy) + column;
    std::memset(row, 0, static_cast<size_t>(kColumnsAtOnce) * sizeof(float));
    const bool has_rows = sum_over_rows(
        parameters.up, slot, fa, columns, call.grad[kBUp] ? factor : nullptr, panels,
        call.grad[kWUp] ? g : nullptr, sums, dy, [&](int64_t t, int64_t r, float* to) {
          if (has_post_norm(call) || has_dropout(call)) {
            read_du<T>(t, column, columns, row);
            put_row(r, kRowsAtOnce, columns, to, [&](int64_t i, auto) { return load(row + i); });
          } else {
            put_row(r, kRowsAtOnce, columns, to,
                    [&](int64_t i, auto part) { return part.load_from(dy + t * call.D + i); });
          }
        });
    if (!has_rows) return;
    const int64_t member = parameters.up.first_member + slot;
    if (call.grad[kBUp]) {
      with_grad<T>(call, kBUp, [&](auto* grad) {
        auto* to = grad + member * call.D + column;
        for_vectors(columns, [&](int64_t i, auto part) { part.store_to(to + i, load(sums + i)); });
      });
    }
    if (call.grad[kWUp] == nullptr) return;
    with_grad<T>(call, kWUp, [&](auto* grad) {
      auto* to = grad + (member * call.D + column) * call.R;
      store_transposed(g, kColumnsAtOnce, call.R, columns, to);
    });
  }

  template <class T>
  void down_backward(int64_t slot, int64_t column, float* memory) {
    const int64_t columns = std::min(kColumnsAtOnce, call.D - column);
    const int64_t padded = round_up(columns, kWidth);
    float* panels = memory;
    const T* x = static_cast<const T*>(call.input[kX]);
    float* sums = panels + kRowsAtOnce * kColumnsAtOnce;
    float* g = sums + kColumnsAtOnce;
    float* rank_sums = g + round_up(call.R, kRowUnit) * kColumnsAtOnce;  // [R], over rows of dh
    const bool has_norm = has_pre_norm(call), wants_gate = call.grad[kGateWeight] != nullptr;
    const bool wants_product = call.grad[kWDown] || has_norm;
    float* of_gate = column_sums + slot * 3 * width() + column;
    const bool has_rows = sum_over_rows(
        parameters.down, slot, dh, columns, wants_gate && !has_norm ? logit : nullptr, panels,
        wants_product ? g : nullptr, sums, x + column, [&](int64_t t, int64_t r, float* to) {
          const T* from = x + t * call.D + column;
          const Moments m = has_norm ? moments[t] : Moments{0.0f, 1.0f};
          put_row(r, kRowsAtOnce, columns, to, [&](int64_t i, auto part) {
            const Vector value = part.load_from(from + i);
            return has_norm ? (value - m.mean) * m.rstd : value;
          });
        });
    if (has_norm && wants_gate) sum_gate_weight<T>(slot, column, columns, sums);
    for (int64_t i = 0; i < padded; i += kWidth) store(of_gate + i, load(sums + i));
    float* dnorm = of_gate + width();
    for (int64_t i = 0; i < padded; i += kWidth) {
      store(dnorm + i, Vector{});
      store(dnorm + width() + i, Vector{});
    }
    if (!has_rows) return;
    const int64_t member = parameters.down.first_member + slot;
    if (has_norm || (call.grad[kBDown] && column == 0)) sum_dh(slot, rank_sums);
    if (call.grad[kBDown] && column == 0) {
      with_grad<T>(call, kBDown, [&](auto* grad) {
        for (int64_t r = 0; r < call.R; ++r) {
          store_part(grad + member * call.R + r, splat(rank_sums[r]), 1);
        }
      });
    }
    if (has_norm) pre_norm_backward<T>(member, column, columns, g, rank_sums, dnorm);
    if (call.grad[kWDown] == nullptr) return;
    with_grad<T>(call, kWDown, [&](auto* grad) {
      for (int64_t r = 0; r < call.R; ++r) {
        auto* to = grad + (member * call.R + r) * call.D + column;
        for_vectors(columns, [&](int64_t i, auto part) {
          part.store_to(to + i, load(g + r * kColumnsAtOnce + i));
        });
      }
    });
  }

  // The gate reads x itself, not what the norm made of it.
  template <class T>
  void sum_gate_weight(int64_t slot, int64_t column, int64_t columns, float* sums) {
    for (int64_t t = 0; t < rows_of(call); ++t) {
      if (parameters.down.slot_of(t / call.S) != slot) continue;
      const T* x = static_cast<const T*>(call.input[kX]) + t * call.D + column;
      for_vectors(columns, [&](int64_t i, auto part) {
        store(sums + i, load(sums + i) + logit[t] * part.load_from(x + i));
      });
    }
  }

  // [R]: the sum of dh over a slot's rows.
  void sum_dh(int64_t slot, float* sums) {
    for (int64_t r = 0; r < call.R; r += kWidth) {
      Vector sum = {};
      for (int64_t begin = 0; begin < rows_of(call); begin += kRowsAtOnce) {
        Vector part = {};
        const int64_t end = std::min(begin + kRowsAtOnce, rows_of(call));
        for (int64_t t = begin; t < end; ++t) {
          if (parameters.down.slot_of(t / call.S) == slot) part += load(dh + t * stride() + r);
        }
        sum += part;
      }
      store_part(sums + r, sum, std::min<int64_t>(kWidth, call.R - r));
    }
  }

  // From G = dh^T xhat: the norm's gradients into dnorm, and G becomes dW_down.
  template <class T>
  void pre_norm_backward(int64_t member, int64_t column, int64_t columns, float* g,
                         const float* rank_sums, float* dnorm) {
    with_parameter<T>(call, kWDown, [&](const auto* w) {
      for (int64_t r = 0; r < call.R; ++r) {
        const auto* w_row = w + (member * call.R + r) * call.D + column;
        float* g_row = g + r * kColumnsAtOnce;
        for_vectors(columns, [&](int64_t i, auto part) {
          const Vector weight = part.load_from(w_row + i), product = load(g_row + i);
          float* dbias = dnorm + width();
          store(dnorm + i, load(dnorm + i) + weight * product);
          store(dbias + i, load(dbias + i) + weight * rank_sums[r]);
          store(g_row + i, product * load(parameters.pre_weight + column + i) +
                               rank_sums[r] * load(parameters.pre_bias + column + i));
        });
      }
    });
  }

  // Gradients [D] that several slots or tiles have parts of.
  template <class T>
  void column_sums_backward() {
    const int64_t slots = parameters.down.slots;
    write_sum<T>(kGateWeight, column_sums, slots, 3 * width());
    write_sum<T>(kPreNormWeight, column_sums + width(), slots, 3 * width());
    write_sum<T>(kPreNormBias, column_sums + 2 * width(), slots, 3 * width());
    write_sum<T>(kPostNormWeight, post_partial, tiles.count(), 2 * width());
    write_sum<T>(kPostNormBias, post_partial + width(), tiles.count(), 2 * width());
  }

  template <class T>
  void write_sum(int which, const float* parts, int64_t count, int64_t distance) {
    if (call.grad[which] == nullptr) return;
    with_grad<T>(call, which, [&](auto* grad) {
      for_vectors(call.D, [&](int64_t i, auto part) {
        Vector sum = {};
        for (int64_t p = 0; p < count; ++p) sum += load(parts + p * distance + i);
        part.store_to(grad + i, sum);
      });
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

}  // namespace pelt::gated_adapter
