// lora_linear's backward on the CPU: the cut of rows into chunks, what its passes hand to each
// other (fused_bwd_cpu.cpp), and memory for it.
#pragma once

#include "ops/lora_linear/cpu_weights.h"

namespace pelt::lora_linear {
namespace {

constexpr int64_t kMostChunks = 32;
constexpr int64_t kChunkRows = 64;  // at least

struct BackwardMemory {
  Linear call;
  int threads;
  Columns columns;
  Tiles tiles;
  int64_t ranks;
  int64_t chunks = 1;
  Weights weights;
  float* down_sums[kMaxBranches + 1] = {};  // [chunks, slots, sum_rows(count), sum_distance(Din)]
  float* up_sums[kMaxBranches] = {};        // [chunks, slots, sum_rows(R), sum_distance(size)]
  double* bias_sums = nullptr;              // [chunks, gates]
  float* d_all = nullptr;                   // [B * S, columns]: ds and dlogit
  float* dot[kMaxBranches] = {};            // [B * S]: <raw, s>
  float* dvalue[kMaxGates] = {};            // [B] | [B, S]
  double* divisors[kMaxGates] = {};         // [B]
  float* scratch = nullptr;
  int64_t scratch_floats = 0;
  bool by_pairs;
  PairWeights pair_weights{/*is_backward=*/true};
  bf16* d_pairs = nullptr;       // [B * S, columns], in the place of d_all
  bf16* d_transposed = nullptr;  // [tiles, columns, tile_rows]; of the last columns anything

  explicit BackwardMemory(const Call& from)
      : call(Linear::of(from)),
        threads(from.threads),
        columns(call),
        tiles(call),
        ranks(call.ranks),
        by_pairs(uses_pairs(call)) {
    const int64_t rows = rows_of(call), floats = std::max<int64_t>(1, floats_of_sums());
    // The sums together are no more than half of what dx and dy are.
    const int64_t affordable = rows * (call.Din + call.Dout) / 2 / floats;
    chunks = std::min({kMostChunks, rows / kChunkRows, affordable, tiles.count()});
    chunks = std::max<int64_t>(chunks, 1);
  }

  // Sums of tile products have room for whole tiles, sums in float32 for whole vectors.
  int64_t sum_rows(int64_t rows) const { return by_pairs ? round_up(rows, kTileSide) : rows; }
  int64_t sum_distance(int64_t count) const {
    return row_distance(by_pairs ? pair_columns(count) : count);
  }
  int64_t down_floats(const Group& group) const {
    return sum_rows(group.count) * sum_distance(call.Din);
  }
  int64_t up_floats(const Branch& branch) const {
    return sum_rows(branch.R) * sum_distance(branch.size);
  }
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

  // Cuts the workspace into its arrays.
  void place(Arena& arena) {
    const int64_t rows = rows_of(call);
    if (by_pairs) {
      pair_weights.place(call, columns, arena);
    } else {
      weights.place(call, columns, arena);
    }
    for (int g = 0; g < columns.groups; ++g) {
      const Group& group = columns.group[g];
      down_sums[g] = arena.take(chunks * group.slots * down_floats(group));
    }
    for (int i = 0; i < call.branches; ++i) {
      const Branch& branch = call.branch[i];
      const int64_t slots = b_bank(branch).slots;
      // Each chunk has sums of its own for each member, so that chunks never write to the same.
      up_sums[i] = arena.take(chunks * slots * up_floats(branch));
      dot[i] = arena.take(rows);
    }
    for (int j = 0; j < call.gates; ++j) {
      dvalue[j] = arena.take(rows);
      divisors[j] = arena.take<double>(call.B);
    }
    bias_sums = arena.take<double>(chunks * call.gates);
    if (by_pairs) {
      d_pairs = arena.take<bf16>(rows * columns.stride);
      d_transposed = arena.take<bf16>(tiles.count() * transposed_numbers());
    } else {
      d_all = arena.take(rows * columns.stride + kWidth);
    }
    // A stretch of x or dy, dropout's factors and what they multiply, a branch's f s, and its raw
    // for all rows of a chunk; see PairMemory for pairs.
    const int64_t stretches = has_dropout(call) ? 3 : 1;
    scratch_floats = tiles.tile_rows * stretches * kStretchStride +
                     (tiles.tile_rows + chunk_rows()) * most_ranks();
    if (by_pairs) scratch_floats = PairMemory(*this, nullptr).bytes / 4;
    scratch_floats = round_up(scratch_floats, 16);
    scratch = arena.take(scratch_floats * threads);
  }

  // Of the tiles of a chunk, at most.
  int64_t chunk_rows() const { return (tiles.count() + chunks - 1) / chunks * tiles.tile_rows; }
  // The longest row of a branch's raw or f s.
  int64_t most_ranks() const {
    int64_t most = 0;
    for (int i = 0; i < call.branches; ++i) most = std::max(most, sum_distance(call.branch[i].R));
    return most;
  }

  // Chunks are whole tiles, as even in number as they can be.
  int64_t first_tile(int64_t chunk) const { return tiles.count() * chunk / chunks; }

  // visit(tile, its place in the chunk)
  template <class Visit>
  void for_tiles(int64_t chunk, Visit&& visit) const {
    const int64_t begin = first_tile(chunk), end = first_tile(chunk + 1);
    for (int64_t i = begin; i < end; ++i) visit(tiles.at(i), i - begin);
  }

  // A thread's memory.
  struct PairMemory {
    float *raw, *scaled;      // as without pairs: [chunk, R] and [tile, R]
    float* logits;            // [tile, the gates' columns]
    float* dropout;           // [tile, kStretchStride]
    bf16* dropped;            // [tile, kStretchStride]: x
    bf16* scaled_transposed;  // [R, tile]
    bf16* panel;              // one of a tile's rows
    int64_t bytes;

    PairMemory(const BackwardMemory& of, float* memory) {
      const int64_t rows = of.tiles.tile_rows, most = of.most_ranks();
      const int64_t dropped_rows = has_dropout(of.call) ? rows : 0;
      Arena arena{reinterpret_cast<char*>(memory)};
      raw = arena.take(of.chunk_rows() * most);
      scaled = arena.take(rows * most);
      logits = arena.take(rows * of.logit_distance());
      dropout = arena.take(dropped_rows * kStretchStride);
      dropped = arena.take<bf16>(dropped_rows * kStretchStride);
      scaled_transposed = arena.take<bf16>(most * rows);
      panel = arena.take<bf16>(rows * kPairColumns);
      bytes = arena.used;
    }
  };

  int64_t logit_distance() const { return sum_distance(call.gates * columns.gate_width); }
  int64_t transposed_numbers() const { return columns.stride * tiles.tile_rows; }
  bf16* transposed_of(int64_t chunk, int64_t place) const {
    return d_transposed + (first_tile(chunk) + place) * transposed_numbers();
  }

  // Where a branch's ranks begin in a row of s.
  int64_t first_rank(int i) const {
    int64_t first = 0;
    for (int k = 0; k < i; ++k) first += call.branch[k].R;
    return first;
  }
};

}  // namespace
}  // namespace pelt::lora_linear
