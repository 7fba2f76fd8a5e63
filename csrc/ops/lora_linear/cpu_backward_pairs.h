// lora_linear's backward on the CPU, its products on tiles (fused_bwd_cpu.cpp).
#pragma once

#include "ops/lora_linear/cpu_backward.h"

namespace pelt::lora_linear {
namespace {

struct PairsBackward : BackwardMemory {
  using BackwardMemory::BackwardMemory;

  // Zeros where d has no column and its transpose no row: a product meets them.
  void clear_pairs(int64_t chunk) {
    for_tiles(chunk, [&](const Tile& tile, int64_t place) {
      std::fill_n(d_pairs + tile.row * columns.stride, tile.rows * columns.stride, bf16{0});
      if (tile.rows % kTileDepth == 0) return;
      std::fill_n(transposed_of(chunk, place), transposed_numbers(), bf16{0});
    });
  }

  // sums [rows of left, count] = or += left [., a tile's rows] X, whose columns are packed for one
  // panel at a time.
  void sum_over_rows(const bf16* left, int64_t left_rows, const PairRows& x, int64_t rows,
                     int64_t count, bf16* panel, float* sums, int64_t distance, bool accumulate) {
    for (int64_t i = 0; i < count; i += kPairColumns) {
      const int64_t here = std::min(kPairColumns, count - i);
      pack_pair_panel(rows, here, panel, [&](int64_t k) { return x.data + k * x.stride + i; });
      multiply_pairs_into({left, tiles.tile_rows}, panel, pair_depth(rows), sum_rows(left_rows),
                          here, sums + i, distance, accumulate);
    }
  }

  // Columns [begin, end) of a tile's dy: raw = or += dy B, and sums, where wanted, = or += (f s)^T
  // dy.
  void pass_over_dy_pairs(int i, const Tile& tile, int64_t begin, int64_t end,
                          const PairMemory& memory, float* raw, float* sums, bool accumulate) {
    const Branch& branch = call.branch[i];
    const int64_t distance = sum_distance(branch.R);
    const PairRows dy = {
        static_cast<const bf16*>(call.dy) + tile.row * call.Dout + branch.offset + begin,
        call.Dout};
    const bf16* b = pair_weights.up[i].of(b_bank(branch).slot_of(tile.sentence));
    // B's panels lie one behind the other, each with the whole depth: this stretch begins inside.
    for (int64_t rank = 0; rank < branch.R; rank += kPairColumns) {
      multiply_pairs_into(dy, b + rank * pair_depth(branch.size) + begin * kPairColumns,
                          end - begin, tile.rows, std::min(kPairColumns, branch.R - rank),
                          raw + rank, distance, begin > 0);
    }
    if (sums == nullptr) return;
    read_scaled<bf16>(call, branch, tile, first_rank(i), ranks, memory.scaled, distance);
    // (f s)^T, rows of a tile beside each other; behind its last row zeros, for rows come in pairs.
    bf16* left = memory.scaled_transposed;
    store_transposed(memory.scaled, distance, tile.rows, branch.R, left, tiles.tile_rows);
    for (int64_t r = 0; r < branch.R; ++r) {
      bf16* row = left + r * tiles.tile_rows;
      std::fill(row + tile.rows, row + pair_depth(tile.rows), bf16{0});
    }
    sum_over_rows(left, branch.R, dy, tile.rows, end - begin, memory.panel, sums + begin,
                  sum_distance(branch.size), accumulate);
  }

  // Into the two columns of d, and into those of its transpose. The weight's second row is no
  // infinity, and must not meet one.
  void put_dlogit(float value, bf16* to, bf16* transposed) {
    split(splat(value), Part{1}, transposed, transposed + tiles.tile_rows);
    to[0] = *transposed;
    to[1] = std::isfinite(to_float(to[0])) ? to[0] : bf16{0};
  }

  // One pass over a chunk's x and dx, as pass_over_x() does it.
  void pass_over_x_pairs(int64_t chunk, const bool* wants, const PairMemory& memory) {
    const int64_t distance = sum_distance(call.Din);
    // A stretch of all the chunk's rows before the next one: its sums stay in cache.
    for (int64_t begin = 0; begin < call.Din; begin += kStretch) {
      const int64_t count = std::min(kStretch, call.Din - begin);
      for_tiles(chunk, [&](const Tile& tile, int64_t place) {
        const PairRows x = {static_cast<const bf16*>(call.x) + tile.row * call.Din + begin,
                            call.Din};
        const PairRows dropped = {memory.dropped, kStretchStride};
        if (has_dropout(call)) {
          read_dropout(call, tile, begin, count, memory.dropout);
          for (int64_t r = 0; r < tile.rows; ++r) {
            drop_row(x.data + r * x.stride, memory.dropout + r * kStretchStride, count,
                     memory.dropped + r * kStretchStride);
          }
        }
        for (int g = columns.groups - 1; g >= 0; --g) {
          const Group& group = columns.group[g];
          const int64_t slot = Weights::slot_of(call, group, tile.sentence);
          // dA = ds^T dropout(x), dw = dlogit^T x: added to over the chunk's tiles.
          if (wants[g]) {
            float* sums = down_sums[g] + (chunk * group.slots + slot) * down_floats(group) + begin;
            sum_over_rows(transposed_of(chunk, place) + group.place * tiles.tile_rows, group.count,
                          group.is_dropped ? dropped : x, tile.rows, count, memory.panel, sums,
                          distance, place > 0 || group.slots > 1);
          }
          if (call.dx != nullptr)
            add_to_dx(group, tile, begin, count, pair_weights.down[g].of(slot), memory.dropout);
        }
      });
    }
  }

  // dx += d times the group's factor, in the product's epilogue: dx is read and written once.
  void add_to_dx(const Group& group, const Tile& tile, int64_t begin, int64_t count,
                 const bf16* panels, const float* dropout) {
    const int64_t depth = pair_depth(group.count), rows = tile.rows, stride = call.Din;
    const PairRows d = {d_pairs + tile.row * columns.stride + group.place, columns.stride};
    bf16* dx = static_cast<bf16*>(call.dx) + tile.row * stride + begin;
    const bool is_dropped = group.is_dropped;
    multiply_pairs_each(d, panels + begin * depth, depth, rows, count, rows,
                        [=](int64_t row, int64_t column, auto& sums) {
                          bf16* to = dx + row * stride + column;
                          const float* factor = dropout + row * kStretchStride + column;
                          store_sums(sums, rows - row, count - column, to, stride,
                                     [=](int64_t r, int64_t k, auto part, Vector sum) {
                                       const Vector before = part.load_from(to + r * stride + k);
                                       if (!is_dropped) return before + sum;
                                       return before + load(factor + r * kStretchStride + k) * sum;
                                     });
                        });
  }
};

}  // namespace
}  // namespace pelt::lora_linear
