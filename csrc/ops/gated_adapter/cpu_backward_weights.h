// gated_adapter's backward on the CPU, the gradients of parameters: sums over all rows.
#pragma once

#include "ops/gated_adapter/cpu_backward_rows.h"

namespace pelt::gated_adapter {
namespace {

struct WeightsBackward : RowsBackward {
  using RowsBackward::RowsBackward;

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
    // Without members of their own sentences are one group, and stretches cross them.
    const int64_t groups = bank.index ? call.B : 1, group_rows = rows_of(call) / groups;
    for (int64_t group = 0; group < groups; ++group) {
      if (bank.slot_of(group) != slot) continue;  // a sentence of another member
      const int64_t end = (group + 1) * group_rows;
      for (int64_t begin = group * group_rows; begin < end; begin += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, end - begin);
        // X is packed once and serves the product and the weighted sums.
        for (int64_t r = 0; r < rows; ++r) pack(begin + r, r, panels);
        if (g != nullptr) {
          const int64_t next = std::min(kRowsAtOnce, end - begin - rows), bytes = sizeof(T);
          // The product asks for the next rows of x while it computes.
          const Ahead ahead(x + (begin + rows) * call.D, call.D * bytes, next, columns * bytes,
                            blocks_of(round_up(call.R, kRowUnit), padded));
          // S as its transpose: from rank to rank 1, from row to row a stride.
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

  // The same with pairs, where S^T brings the weights along. row(t, i) gives X[t] from column i on,
  // in either type; it is called for rows in order, and its result has to live for two of them.
  template <class T, class Row>
  bool sum_pairs_over_rows(const Bank& bank, int64_t slot, const Transposed& s, int64_t columns,
                           bool wants_sums, float* memory, float* g, float* sums, const T* x,
                           Row&& row) {
    bf16* panels = reinterpret_cast<bf16*>(memory);
    // Two more rows of S^T have the weights of the sums.
    const int64_t rank = round_up(call.R + (wants_sums ? 2 : 0), kTileSide);
    bool is_first = true;
    for (int64_t group = 0; group < s.groups; ++group) {
      if (bank.slot_of(group) != slot) continue;
      const int64_t end = (group + 1) * s.group_rows;
      for (int64_t begin = group * s.group_rows; begin < end; begin += kPairRowsAtOnce) {
        const int64_t rows = std::min(kPairRowsAtOnce, end - begin);
        for (int64_t i = 0; i < columns; i += kPairColumns) {
          pack_pair_panel(rows, std::min(kPairColumns, columns - i), panels + i * pair_depth(rows),
                          [&](int64_t k) { return row(begin + k, i); });
        }
        const int64_t next = std::min(kPairRowsAtOnce, end - begin - rows), bytes = sizeof(T);
        const Ahead ahead(x + (begin + rows) * call.D, call.D * bytes, next, columns * bytes,
                          pair_blocks_of(rank, columns));
        multiply_pairs_into({s.data + s.place(begin), s.stride()}, panels, pair_depth(rows), rank,
                            columns, g, kColumnsAtOnce, !is_first, ahead);
        is_first = false;
      }
    }
    std::memset(sums, 0, static_cast<size_t>(kColumnsAtOnce) * sizeof(float));
    for (int64_t i = 0; wants_sums && !is_first && i < columns; i += kWidth) {
      const float* of_weights = g + call.R * kColumnsAtOnce + i;
      // By the weights' bfloat16 values, and by what those leave out.
      store(sums + i, load(of_weights) + load(of_weights + kColumnsAtOnce));
    }
    return !is_first;
  }

  // dW_up and db_up, columns [column, column + kColumnsAtOnce) of one slot.
  template <class T>
  void up_backward(int64_t slot, int64_t column, float* memory) {
    const int64_t columns = std::min(kColumnsAtOnce, call.D - column);
    float* panels = memory;  // [kRowsAtOnce, columns]
    float* sums = panels + kRowsAtOnce * kColumnsAtOnce;
    float* row = sums + kColumnsAtOnce;   // two, with pairs
    float* g = row + 2 * kColumnsAtOnce;  // [R, columns]: the transpose of dW_up
    const T* dy = call.doutput_as<T>(kY) + column;
    std::memset(row, 0, static_cast<size_t>(kColumnsAtOnce) * sizeof(float));  // and behind D
    const bool is_made = has_post_norm(call) || has_dropout(call);  // du is not dy as it lies
    bool has_rows;
    if (by_pairs && is_made) {
      has_rows = sum_pairs_over_rows(
          parameters.up, slot, fa_transposed, columns, call.grad[kBUp] != nullptr, panels, g, sums,
          dy, [&](int64_t t, int64_t i) {
            float* to = row + (t & 1) * kColumnsAtOnce;  // a pair needs both its rows
            read_du<T>(t, column + i, std::min(kPairColumns, columns - i), to);
            return static_cast<const float*>(to);
          });
    } else if (by_pairs) {
      has_rows = sum_pairs_over_rows(parameters.up, slot, fa_transposed, columns,
                                     call.grad[kBUp] != nullptr, panels, g, sums, dy,
                                     [&](int64_t t, int64_t i) { return dy + t * call.D + i; });
    } else {
      has_rows = sum_over_rows(
          parameters.up, slot, fa, columns, call.grad[kBUp] ? factor : nullptr, panels,
          call.grad[kWUp] ? g : nullptr, sums, dy, [&](int64_t t, int64_t r, float* to) {
            if (is_made) {
              read_du<T>(t, column, columns, row);
              put_row(r, kRowsAtOnce, columns, to, [&](int64_t i, auto) { return load(row + i); });
            } else {
              put_row(r, kRowsAtOnce, columns, to,
                      [&](int64_t i, auto part) { return part.load_from(dy + t * call.D + i); });
            }
          });
    }
    if (!has_rows) return;  // nobody used this member: its gradients are zeros already
    const int64_t member = parameters.up.first_member() + slot;
    if (call.grad[kBUp]) {
      with_elements<T>(call.parameter_grad(kBUp), [&](auto* grad) {
        auto* to = grad + member * call.D + column;
        for_vectors(columns, [&](int64_t i, auto part) { part.store_to(to + i, load(sums + i)); });
      });
    }
    if (call.grad[kWUp] == nullptr) return;
    with_elements<T>(call.parameter_grad(kWUp), [&](auto* grad) {
      // W_up lies as [D, R], the sums as [R, columns].
      auto* to = grad + (member * call.D + column) * call.R;
      store_transposed(g, kColumnsAtOnce, call.R, columns, to, call.R);
    });
  }

  // dW_down, and what else is a sum over rows of x or dh: dw_gate, db_down, the pre-norm's own
  // gradients; columns [column, column + kColumnsAtOnce) of one slot.
  template <class T>
  void down_backward(int64_t slot, int64_t column, float* memory) {
    const int64_t columns = std::min(kColumnsAtOnce, call.D - column);
    const int64_t padded = round_up(columns, kWidth);
    float* panels = memory;
    const T* x = call.input_as<T>(kX);
    float* sums = panels + kRowsAtOnce * kColumnsAtOnce;
    float* row = sums + kColumnsAtOnce;  // two, with pairs
    float* g = row + 2 * kColumnsAtOnce;
    float* rank_sums = g + round_up(call.R + 2, kPairBlockRows) * kColumnsAtOnce;  // [R], over dh
    const bool has_norm = has_pre_norm(call), wants_gate = call.grad[kGateWeight] != nullptr;
    const bool wants_product = call.grad[kWDown] || has_norm;  // a norm's gradients need G too
    float* of_gate = column_sums + slot * 3 * width() + column;
    const bool wants_sums = wants_gate && !has_norm;  // beside a norm X is not x
    // xhat: dW_down and the norm's gradients follow from it without another pass.
    auto normed = [&](int64_t t, Vector value) {
      return (value - moments[t].mean) * moments[t].rstd;
    };
    bool has_rows;
    if (by_pairs && has_norm) {
      has_rows = sum_pairs_over_rows(
          parameters.down, slot, dh_transposed, columns, wants_sums, panels, g, sums, x + column,
          [&](int64_t t, int64_t i) {
            const T* from = x + t * call.D + column + i;
            float* to = row + (t & 1) * kColumnsAtOnce;
            for_vectors(std::min(kPairColumns, columns - i), [&](int64_t j, auto part) {
              store(to + j, normed(t, part.load_from(from + j)));
            });
            return static_cast<const float*>(to);
          });
    } else if (by_pairs) {
      has_rows = sum_pairs_over_rows(
          parameters.down, slot, dh_transposed, columns, wants_sums, panels, g, sums, x + column,
          [&](int64_t t, int64_t i) { return x + t * call.D + column + i; });
    } else {
      has_rows = sum_over_rows(parameters.down, slot, dh, columns, wants_sums ? dlogit : nullptr,
                               panels, wants_product ? g : nullptr, sums, x + column,
                               [&](int64_t t, int64_t r, float* to) {
                                 const T* from = x + t * call.D + column;
                                 put_row(r, kRowsAtOnce, columns, to, [&](int64_t i, auto part) {
                                   const Vector value = part.load_from(from + i);
                                   return has_norm ? normed(t, value) : value;
                                 });
                               });
    }
    // Left by slots, for column_sums_backward to add up.
    if (has_norm && wants_gate) sum_gate_weight<T>(slot, column, columns, sums);
    for (int64_t i = 0; i < padded; i += kWidth) store(of_gate + i, load(sums + i));
    float* dnorm = of_gate + width();  // weight, and bias one width behind
    for (int64_t i = 0; i < padded; i += kWidth) {
      store(dnorm + i, Vector{});
      store(dnorm + width() + i, Vector{});
    }
    if (!has_rows) return;  // nobody used this member: its gradients are zeros already
    const int64_t member = parameters.down.first_member() + slot;
    if (has_norm || (call.grad[kBDown] && column == 0)) sum_dh(slot, rank_sums);
    if (call.grad[kBDown] && column == 0) {  // [R]: once, not for each block of columns
      with_elements<T>(call.parameter_grad(kBDown), [&](auto* grad) {
        for (int64_t r = 0; r < call.R; ++r) {
          store_part(grad + member * call.R + r, splat(rank_sums[r]), 1);
        }
      });
    }
    if (has_norm) pre_norm_backward<T>(slot, column, columns, g, rank_sums, dnorm);
    if (call.grad[kWDown] == nullptr) return;
    with_elements<T>(call.parameter_grad(kWDown), [&](auto* grad) {
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
      const T* x = call.input_as<T>(kX) + t * call.D + column;
      for_vectors(columns, [&](int64_t i, auto part) {
        store(sums + i, load(sums + i) + dlogit[t] * part.load_from(x + i));
      });
    }
  }

  // [R]: the sum of dh over a slot's rows.
  void sum_dh(int64_t slot, float* sums) {
    if (by_pairs) return sum_dh_pairs(slot, sums);
    for (int64_t r = 0; r < call.R; r += kWidth) {
      Vector sum = {};
      for (int64_t begin = 0; begin < rows_of(call); begin += kRowsAtOnce) {
        // Sums of stretches, then their sum: fewer roundings than one sum over all rows.
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

  // The same from the transpose, where a rank's rows are neighbours.
  void sum_dh_pairs(int64_t slot, float* sums) {
    const Transposed& s = dh_transposed;
    for (int64_t r = 0; r < call.R; ++r) {
      sums[r] = 0.0f;
      for (int64_t group = 0; group < s.groups; ++group) {
        if (parameters.down.slot_of(group) != slot) continue;
        Vector sum = {};
        const bf16* from = s.data + r * s.stride() + group * s.pitch();
        for (int64_t t = 0; t < s.pitch(); t += kWidth) sum += load(from + t);
        sums[r] += sum_of(sum);
      }
    }
  }

  // From G = dh^T xhat: the norm's gradients into dnorm, and G becomes dW_down.
  template <class T>
  void pre_norm_backward(int64_t slot, int64_t column, int64_t columns, float* g,
                         const float* rank_sums, float* dnorm) {
    const int64_t member = parameters.down.first_member() + slot;
    const float* norm_weight = parameters.pre_norm.weight_of(slot) + column;
    const float* norm_bias = parameters.pre_norm.bias_of(slot) + column;
    with_elements<T>(call.parameter(kWDown), [&](const auto* w) {
      for (int64_t r = 0; r < call.R; ++r) {
        const auto* w_row = w + (member * call.R + r) * call.D + column;
        float* g_row = g + r * kColumnsAtOnce;
        for_vectors(columns, [&](int64_t i, auto part) {
          // With h = W_down (w xhat + b): dw is the sum over ranks of W_down times G, db that of
          // W_down times the sum of dh, and dW_down = G w + (sum of dh) b.
          const Vector weight = part.load_from(w_row + i), product = load(g_row + i);
          float* dbias = dnorm + width();
          store(dnorm + i, load(dnorm + i) + weight * product);
          store(dbias + i, load(dbias + i) + weight * rank_sums[r]);
          store(g_row + i, product * load(norm_weight + i) + rank_sums[r] * load(norm_bias + i));
        });
      }
    });
  }

  // Gradients [D] that several slots or tiles have parts of; of banks, whose other members are
  // zeros already, each member's own.
  template <class T>
  void column_sums_backward() {
    const int64_t slots = parameters.down.slots;
    // Slots leave three rows each, tiles two.
    write_sum<T>(kGateWeight, 0, column_sums, slots, 3 * width());
    if (!has_pre_norm_bank(call)) {
      write_sum<T>(kPreNormWeight, 0, column_sums + width(), slots, 3 * width());
      write_sum<T>(kPreNormBias, 0, column_sums + 2 * width(), slots, 3 * width());
    }
    for (int64_t slot = 0; has_pre_norm_bank(call) && slot < slots; ++slot) {
      const int64_t member = parameters.down.first_member() + slot;
      const float* parts = column_sums + slot * 3 * width();
      write_sum<T>(kPreNormWeight, member, parts + width(), 1, 3 * width());
      write_sum<T>(kPreNormBias, member, parts + 2 * width(), 1, 3 * width());
    }
    if (!has_post_norm_bank(call)) {
      write_sum<T>(kPostNormWeight, 0, post_partial, tiles.count(), 2 * width());
      write_sum<T>(kPostNormBias, 0, post_partial + width(), tiles.count(), 2 * width());
    }
    for (int64_t slot = 0; has_post_norm_bank(call) && slot < parameters.up.slots; ++slot) {
      const float* sums = sum_of_tiles(slot);
      if (sums == nullptr) continue;
      const int64_t member = parameters.up.first_member() + slot;
      write_sum<T>(kPostNormWeight, member, sums, 1, 2 * width());
      write_sum<T>(kPostNormBias, member, sums + width(), 1, 2 * width());
    }
  }

  // What the tiles of one slot of a post-norm's bank have left, added up in their order in the
  // place of the first of them; null where there is none.
  float* sum_of_tiles(int64_t slot) {
    float* sums = nullptr;
    for (int64_t i = 0; i < tiles.count(); ++i) {
      if (parameters.up.slot_of(tiles.at(i).sentence) != slot) continue;
      float* of_tile = post_partial + i * 2 * width();
      for (int64_t j = 0; sums != nullptr && j < 2 * width(); j += kWidth) {
        store(sums + j, load(sums + j) + load(of_tile + j));
      }
      if (sums == nullptr) sums = of_tile;
    }
    return sums;
  }

  // Row `member` of a gradient [D], or of a bank of them: the sum of parts.
  template <class T>
  void write_sum(int which, int64_t member, const float* parts, int64_t count, int64_t distance) {
    if (call.grad[which] == nullptr) return;
    with_elements<T>(call.parameter_grad(which), [&](auto* grad) {
      auto* to = grad + member * call.D;
      for_vectors(call.D, [&](int64_t i, auto part) {
        Vector sum = {};
        // In their order, whichever thread left them.
        for (int64_t p = 0; p < count; ++p) sum += load(parts + p * distance + i);
        part.store_to(to + i, sum);
      });
    });
  }
};

}  // namespace
}  // namespace pelt::gated_adapter
