// gated_adapter's backward on the CPU, what is done row by row: dh and f a, the gates, dx.
#pragma once

#include "ops/gated_adapter/cpu_backward.h"

namespace pelt::gated_adapter {
namespace {

// da phi'(h). Where relu has no slope it lets nothing through, not even a NaN.
template <Activation kActivation>
inline Vector through_activation(Vector da, Vector h) {
  if constexpr (kActivation == Activation::kRelu) return h <= 0.0f ? Vector{} : da;
  return da * activation_slope<kActivation>(h);
}

struct RowsBackward : BackwardMemory {
  using BackwardMemory::BackwardMemory;

  // ---- rows: dh and f a, dots and gates ----

  // Tile i, whose rows no other tile touches; `memory` is its thread's.
  template <class T>
  void rows_backward(int64_t i, float* memory) {
    const Tile tile = tiles.at(i);
    float* da = memory;  // [tile, stride]; with pairs a behind it
    float* operand = memory + tiles.tile_rows * operand_floats();    // a stretch of du, or its rows
    float* bias_dot = operand + tiles.tile_rows * stretch_floats();  // [tile]
    float* u = bias_dot + round_up(tiles.tile_rows, 16);  // [tile, width], with a post-norm
    float* a = by_pairs ? da + tiles.tile_rows * stride() : fa + tile.row * stride();
    bf16* a_pairs = reinterpret_cast<bf16*>(a + tiles.tile_rows * stride());
    // What each row needs before the product: forward keeps neither statistics nor rows' gates.
    const T* x = call.input_as<T>(kX) + tile.row * call.D;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      // With a post-norm du is in memory and has the factor.
      factor[row] = has_post_norm(call) ? 1.0f : parameters.scale * gate_of<T>(call, row);
      bias_dot[r] = 0.0f;
      if (has_learned_gate(call)) {
        row_gate[row] = sigmoid_of(dot_of(x + r * call.D, parameters.gate_weight, call.D) +
                                   parameters.gate_bias);
      }
      if (has_pre_norm(call)) {
        moments[row] = moments_of(x + r * call.D, call.D, call.pre_norm_eps);
      }
    }
    activate_rows<T>(tile, a);  // a = phi(h)
    if (has_post_norm(call)) post_norm_backward<T>(i, tile, a, a_pairs, u);
    if (by_pairs) {
      pairs_times_up<T>(tile, reinterpret_cast<bf16*>(operand), da, bias_dot);
    } else {
      stretches_times_up<T>(tile, operand, da, bias_dot);
    }
    // dh, f a in the place of a, and the dot, in one pass over [tile, R].
    const T* h = call.output_as<const T>(kH) + tile.row * call.R;
    float* of_dh = by_pairs ? da : dh + tile.row * stride();
    with_activation(call.activation, [&](auto activation) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = tile.row + r;
        Vector sum = {};
        for_vectors(call.R, [&](int64_t j, auto part) {
          const int64_t place = r * stride() + j;
          const Vector value = load(a + place), d = load(da + place);
          const Vector through = through_activation<decltype(activation)::value>(
              d, part.load_from(h + r * call.R + j));
          sum += value * d;  // <dropped W_up, a>
          store(a + place, factor[row] * value);
          store(of_dh + place, factor[row] * through);
        });
        if (!has_post_norm(call)) dot[row] = sum_of(sum) + bias_dot[r];
      }
    });
    if (by_pairs) keep_pairs(tile, a, of_dh);
  }

  // A post-norm's dots come with its own sums.
  bool wants_dot() const { return needs_dot() && !has_post_norm(call); }

  // da = du W_up, and <dropped, b_up>.
  template <class T>
  void stretches_times_up(const Tile& tile, float* stretch, float* da, float* bias_dot) {
    const int64_t slot = parameters.up.slot_of(tile.sentence);
    const float* bias = parameters.b_up + slot * width();
    for (int64_t begin = 0; begin < call.D; begin += kDepth) {
      const int64_t depth = std::min(kDepth, call.D - begin);
      // The stretch is read once for both: the product and the bias's share of the dot.
      for (int64_t r = 0; r < tile.rows; ++r) {
        float* to = stretch + r * kDepth;
        read_du<T>(tile.row + r, begin, depth, to);
        if (wants_dot()) bias_dot[r] += dot_of(to, bias + begin, depth);
      }
      // The product asks for the next stretch of dy while it computes.
      const int64_t next = begin + depth, bytes = sizeof(T);
      const Ahead ahead(call.doutput_as<T>(kY) + tile.row * call.D + next, call.D * bytes,
                        tile.rows, std::min(kDepth, call.D - next) * bytes,
                        blocks_of(tile.rows, padded_rank(call)));
      multiply_into(stretch, kDepth, 1, {up.of(slot), call.D, begin, depth}, da, stride(),
                    tile.padded, padded_rank(call), begin > 0, next < call.D ? ahead : Ahead());
    }
  }

  // The same from rows where they lie, or from du in bfloat16; a few at a time, so that they are in
  // the first cache when they are multiplied.
  template <class T>
  void pairs_times_up(const Tile& tile, bf16* rows_of_du, float* da, float* bias_dot) {
    const int64_t slot = parameters.up.slot_of(tile.sentence), distance = stride();
    const float* bias = parameters.b_up + slot * width();
    PairRows rows = {call.doutput_as<bf16>(kY) + tile.row * call.D, call.D};
    // du is dy as it lies, but for dropout and a post-norm.
    const bool is_kept = has_post_norm(call) || has_dropout(call);
    if (is_kept) rows = {rows_of_du, pair_distance(call.D)};
    for (int64_t first = 0; first < tile.rows; first += kPairBlockRows) {
      const int64_t count = std::min(kPairBlockRows, tile.rows - first);
      for (int64_t r = first; r < first + count; ++r) {
        alignas(64) float values[kDepth];  // in float32, before it is rounded
        for (int64_t begin = 0; is_kept && begin < call.D; begin += kDepth) {
          const int64_t depth = std::min(kDepth, call.D - begin);
          read_du<T>(tile.row + r, begin, depth, values);
          for_vectors(depth, [&](int64_t j, auto part) {
            part.store_to(rows_of_du + r * rows.stride + begin + j, load(values + j));
          });
          if (wants_dot()) bias_dot[r] += dot_of(values, bias + begin, depth);
        }
        if (wants_dot() && !is_kept) bias_dot[r] = dot_of(rows.data + r * call.D, bias, call.D);
      }
      // da stays float32: it is rounded as dh, after the activation's slope.
      const PairRows block = {rows.data + first * rows.stride, rows.stride};
      float* to = da + first * distance;
      multiply_pairs_each(block, up.pairs_of(slot), call.D, count, call.R, kPairBlockRows,
                          [=](int64_t row, int64_t column, auto& sums) {
                            store_sums(sums, count - row, distance - column,
                                       to + row * distance + column, distance,
                                       [](int64_t, int64_t, auto, Vector sum) { return sum; });
                          });
    }
  }

  // A tile's dh and f a [tile, stride] as operands of what follows.
  void keep_pairs(const Tile& tile, const float* a, const float* of_dh) {
    const int64_t distance = pair_distance(call.R), end = pair_depth(call.R);
    for (int64_t r = 0; r < tile.rows; ++r) {
      bf16* to = dh_pairs + (tile.row + r) * distance;
      for_vectors(call.R, [&](int64_t j, auto part) {
        part.store_to(to + j, load(of_dh + r * stride() + j));
      });
      std::fill(to + call.R, to + end, bf16{0});  // a product takes whole pairs
      // db_up is a sum over rows of factor times dropped: a row of the transpose has the factors.
      fa_transposed.put_weight(tile.row + r, factor[tile.row + r]);
    }
    // A tile writes its own columns of the transposes, and the last of a group the zeros behind.
    const int64_t group = tile.row / tiles.group_rows;
    const bool is_last = tile.row + tile.rows == (group + 1) * tiles.group_rows;
    for (Transposed* to : {&dh_transposed, &fa_transposed}) {
      store_transposed(to == &dh_transposed ? of_dh : a, stride(), tile.rows, call.R,
                       to->data + to->place(tile.row), to->stride());
      if (is_last) to->pad(group);
    }
  }

  // The gradients of scale and of gates are sums of dots.
  bool needs_dot() const { return call.grad[kScale] || call.grad[kGate] || has_learned_gate(call); }

  // a [tile, stride] = phi(h), in float32: on tiles it is rounded when it becomes an operand.
  template <class T>
  void activate_rows(const Tile& tile, float* a) {
    const T* h = call.output_as<const T>(kH) + tile.row * call.R;
    with_activation(call.activation, [&](auto activation) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        for_vectors(call.R, [&](int64_t j, auto part) {
          store(a + r * stride() + j,
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
    const T* dy = call.doutput_as<T>(kY) + row * call.D + begin;
    for_vectors(count, [&](int64_t i, auto part) { store(to + i, part.load_from(dy + i)); });
    if (has_dropout(call)) apply_dropout(call, row, begin, count, to);
  }

  // du of a tile from u made again, and the tile's part of the norm's own gradients.
  template <class T>
  void post_norm_backward(int64_t i, const Tile& tile, const float* a, bf16* a_pairs, float* u) {
    const int64_t slot = parameters.up.slot_of(tile.sentence);
    const float* weight = parameters.post_norm.weight_of(slot);
    const float* shift = parameters.post_norm.bias_of(slot);
    multiply_up_again(tile, slot, a, a_pairs, u);
    float* dweight = post_partial + i * 2 * width();
    float* dbias = dweight + width();
    // Sums of its own for each tile: they are added in the tiles' order later.
    std::memset(dweight, 0, static_cast<size_t>(2 * width()) * sizeof(float));
    float* dropped = u + tiles.tile_rows * width();                         // [width]
    std::memset(dropped, 0, static_cast<size_t>(width()) * sizeof(float));  // and behind D
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const float f = parameters.scale * gate_of<T>(call, row);
      const T* dy = call.doutput_as<T>(kY) + row * call.D;
      for_vectors(call.D,
                  [&](int64_t j, auto part) { store(dropped + j, part.load_from(dy + j)); });
      if (has_dropout(call)) apply_dropout(call, row, 0, call.D, dropped);
      float* u_row = u + r * width();
      const Moments m = moments_of(u_row, call.D, call.post_norm_eps);
      // One pass for the row's dot, the norm's own gradients, and the two sums that du needs; hat
      // and dhat take the places of u and dropped.
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
      // Mean and deviation move with u: their parts are taken off.
      const float n = static_cast<float>(call.D);
      const float mean = sum_of(sum) / n, mean_hat = sum_of(sum_hat) / n;
      for (int64_t j = 0; j < width(); j += kWidth) {
        store(du + row * width() + j,
              m.rstd * (load(dropped + j) - mean - mean_hat * load(u_row + j)));
      }
    }
  }

  // u [tile, width] = W_up a + b_up.
  void multiply_up_again(const Tile& tile, int64_t slot, const float* a, bf16* a_pairs, float* u) {
    const float* bias = parameters.b_up + slot * width();
    const int64_t columns = width(), rows = tile.padded;
    auto finish = [=](int64_t row, int64_t column, auto& sums) {
      store_sums(
          sums, rows - row, columns - column, u + row * columns + column, columns,
          [=](int64_t, int64_t j, auto, Vector sum) { return sum + load(bias + column + j); });
    };
    if (!by_pairs) {  // float32 as it is
      multiply_each(a, stride(), up_again.of(slot), call.R, rows, columns, finish);
      return;
    }
    const int64_t distance = pair_distance(call.R);
    for (int64_t r = 0; r < tile.rows; ++r) {  // rounded, as forward's product took it
      bf16* to = a_pairs + r * distance;
      for_vectors(call.R,
                  [&](int64_t j, auto part) { part.store_to(to + j, load(a + r * stride() + j)); });
      std::fill(to + call.R, to + pair_depth(call.R), bf16{0});
    }
    multiply_pairs_each({a_pairs, distance}, up_again.pairs_of(slot), pair_depth(call.R), tile.rows,
                        call.D, rows, finish);
  }

  // ---- gates: sums over what the rows left, in their order ----

  template <class T>
  void gates_backward() {
    if (!needs_dot()) return;
    const bool has_gate = has_learned_gate(call) || call.input[kGate];
    double dscale = 0.0, dgate_bias = 0.0;  // float64: sums over all rows keep their digits
    for (int64_t b = 0; b < call.B; ++b) {
      const int64_t begin = b * call.S, end = begin + call.S;
      double sum = 0.0;
      for (int64_t row = begin; row < end; ++row) {  // in order, whatever the threads
        sum += dot[row];
        dscale += static_cast<double>(dot[row]) * (has_gate ? gate_of<T>(call, row) : 1.0f);
      }
      if (has_learned_gate(call)) {
        // A pooled gate has the sum of all the sentence's dots, and each row its share of it.
        const int64_t counted = counted_rows(call, b);
        for (int64_t row = begin; row < end; ++row) {
          const double s = row_gate[row], dgate = has_pooled_gate(call) ? sum : dot[row];
          const double share = share_of(call, row, counted);
          // A row that does not count has no part in a gate that may be infinite.
          const double of_row =
              share == 0.0 ? 0.0 : parameters.scale * dgate * share * s * (1.0 - s);
          dlogit[row] = static_cast<float>(of_row);
          // dw_gate is a sum over rows of dlogit times x: a row of the transpose has the dlogits.
          if (by_pairs) dh_transposed.put_weight(row, dlogit[row]);
          dgate_bias += of_row;
        }
      } else if (call.grad[kGate]) {
        // A given gate: its rows' dots, or their sum, times scale.
        const ParameterGrad grad = call.parameter_grad(kGate);
        for (int64_t row = begin; has_gate_per_row(call) && row < end; ++row) {
          write_element<T>(grad, row, parameters.scale * dot[row]);
        }
        if (!has_gate_per_row(call)) {
          write_element<T>(grad, b, parameters.scale * static_cast<float>(sum));
        }
      }
    }
    write_scalar<T>(kScale, dscale * call.scale_value);
    write_scalar<T>(kGateBias, dgate_bias);
  }

  template <class T>
  void write_scalar(int which, double value) {
    if (call.grad[which] == nullptr) return;
    write_element<T>(call.parameter_grad(which), 0, static_cast<float>(value));
  }

  // ---- dx = dh W_down through the pre-norm, + dlogit w_gate + dy ----

  template <class T>
  void x_backward(const Tile& tile, float* memory) {
    const int64_t slot = parameters.down.slot_of(tile.sentence);
    const bool has_gate = has_learned_gate(call);
    const bool has_residual = call.residual_from == ResidualFrom::kInput;
    const T* dy = call.doutput_as<T>(kY);
    T* dx = call.grad_as<T>(kX) + tile.row * call.D;
    // What a row does not have costs nothing: each combination is compiled by itself.
    if (!has_pre_norm(call)) {
      if (has_residual && has_gate) return product_dx<true, true>(tile, slot, dx);
      if (has_residual) return product_dx<true, false>(tile, slot, dx);
      if (has_gate) return product_dx<false, true>(tile, slot, dx);
      return product_dx<false, false>(tile, slot, dx);
    }
    // dhat = w dz first, because the norm's gradient needs two sums of the whole row.
    float* dz = memory;  // [tile, width]
    const int64_t columns = width(), rows = tile.padded;
    const float* weight = parameters.pre_norm.weight_of(slot);
    multiply_down(tile, slot, [=](int64_t row, int64_t column, auto& sums) {
      store_sums(
          sums, rows - row, columns - column, dz + row * columns + column, columns,
          [=](int64_t, int64_t j, auto, Vector sum) { return sum * load(weight + column + j); });
    });
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const T* x = call.input_as<T>(kX) + row * call.D;
      const float* dhat = dz + r * width();
      const Moments m = moments[row];
      // Of dhat, and of dhat hat(x).
      Vector sum = {}, sum_hat = {};
      for_vectors(call.D, [&](int64_t j, auto part) {
        sum += load(dhat + j);
        sum_hat += load(dhat + j) * ((part.load_from(x + j) - m.mean) * m.rstd);
      });
      const float n = static_cast<float>(call.D);
      const float mean = sum_of(sum) / n, mean_hat = sum_of(sum_hat) / n;
      for_vectors(call.D, [&](int64_t j, auto part) {
        const Vector hat = (part.load_from(x + j) - m.mean) * m.rstd;
        // The residual and the gate see x before the norm.
        Vector through = m.rstd * (load(dhat + j) - mean - mean_hat * hat);
        if (has_residual) through += part.load_from(dy + row * call.D + j);
        if (has_gate) through += dlogit[row] * load(parameters.gate_weight + j);
        part.store_to(dx + r * call.D + j, through);
      });
    }
  }

  // dh W_down, in blocks for finish(row, column, sums).
  template <class Finish>
  void multiply_down(const Tile& tile, int64_t slot, Finish&& finish) {
    if (by_pairs) {
      const int64_t distance = pair_distance(call.R);
      multiply_pairs_each({dh_pairs + tile.row * distance, distance}, down.pairs_of(slot),
                          pair_depth(call.R), tile.rows, call.D, tile.padded, finish);
    } else {
      multiply_each(dh + tile.row * stride(), stride(), down.of(slot), call.R, tile.padded, width(),
                    finish);
    }
  }

  // Straight from the registers of the product.
  template <bool kHasResidual, bool kHasGate, class T>
  void product_dx(const Tile& tile, int64_t slot, T* dx) {
    const int64_t width = call.D;
    const T* dy = call.doutput_as<T>(kY) + tile.row * width;
    // One rounding, at the store: product, residual and the gate's part are float32.
    const float *dlogits = dlogit + tile.row, *gate_weight = parameters.gate_weight;
    auto finish = [=](int64_t row, int64_t column, auto& sums) __attribute__((always_inline)) {
      const int64_t place = row * width + column, stride = width;
      const T* from = dy + place;
      const float *of_row = dlogits + row, *of_column = gate_weight + column;
      store_sums(sums, tile.rows - row, width - column, dx + place, stride,
                 [=](int64_t r, int64_t i, auto part, Vector sum) {
                   if (kHasResidual) sum += part.load_from(from + r * stride + i);
                   if (kHasGate) sum += of_row[r] * load(of_column + i);
                   return sum;
                 });
    };
    multiply_down(tile, slot, finish);
  }
};

}  // namespace
}  // namespace pelt::gated_adapter
