// Which columns a block of the kernel of keys and values has, and which queries it walks.
//
// The grid is one-dimensional: first the blocks of prefix columns, prefix by prefix, then those of
// own columns.
//
//   prefix i:  tile of 16 columns (fastest), key-value head, member of the table, chunk of the
//   batch own:       tile of 64 columns (fastest), key-value head, sample
//
// A walk goes through tiles of 64 queries (fastest), the query heads that share the key-value head,
// and samples: of own columns one, of a prefix those of the chunk that use the block's member.
#pragma once

#include "ops/prefix_attention/tiles.cuh"

namespace pelt::prefix_attention {

// The columns of a block: [begin, end) of the joined axis, in a tile that starts at `first`.
struct Columns {
  int first;
  int begin;
  int end;
  int seen_end;  // behind the last column that is seen
  int prefix;    // which one, or -1 for own columns
  int member;    // of the prefix's table
  int chunk;     // of the batch
  int g;         // the key-value head
};

// One tile of queries.
struct Walk {
  int b;
  int h;
  int tile;
};

// Where a walk ends, and where its inner loops begin again.
struct Range {
  int b_end;
  int h_begin;
  int h_end;
  int tile_begin;
  int tile_end;
};

// The first sample from b on that uses the block's member, or `end`; b itself without a table.
__device__ __forceinline__ int next_sample(const CudaInputs& in, const Columns& columns, int b,
                                           int end) {
  if (columns.prefix < 0) return b;
  const int64_t* index = in.index_of(columns.prefix);
  if (index == nullptr) return b;
  while (b < end && index[b] != columns.member) ++b;
  return b;
}

// The tile of queries after this one; its b is range.b_end, or behind it, after the last one.
__device__ __forceinline__ Walk advanced(const CudaInputs& in, const Columns& columns,
                                         const Range& range, Walk walk) {
  if (++walk.tile < range.tile_end) return walk;
  walk.tile = range.tile_begin;
  if (++walk.h < range.h_end) return walk;
  walk.h = range.h_begin;
  walk.b = next_sample(in, columns, walk.b + 1, range.b_end);
  return walk;
}

// Derives what the block has to do from its number, into shared memory. The whole block takes part,
// and may read the results when it returns.
__device__ __forceinline__ void place_block(const BackwardParams& p, Columns& s_columns,
                                            Range& s_range, Walk& s_walk, int (&scratch)[kWarps]) {
  const CudaInputs& in = p.in;
  Columns columns;
  Range range;
  Walk walk;
  int block = block_index_x(), g;
  range.tile_begin = 0;
  range.tile_end = (in.S + kRowTile - 1) / kRowTile;
  if (block >= p.prefix_blocks) {
    block -= p.prefix_blocks;
    const int tile = block % p.own_tiles, head = block / p.own_tiles;
    g = head % in.G, walk.b = head / in.G;
    // With dropout the first tile may begin inside the prefix.
    columns = {in.tiles_from(in.P) + tile * kOwnTile, in.P, in.P + in.N, 0, -1, 0, 0, 0};
    columns.seen_end = seen_end_of(in, walk.b, scratch);
    range.b_end = walk.b + 1;
    if (columns.first >= columns.seen_end) range.tile_end = 0;  // padding: no query sees the tile
    if (in.is_causal) {  // row i sees own column n from i = n + S - N on
      const int n = columns.first > in.P ? columns.first - in.P : 0;
      const int row = n + in.S - in.N;
      range.tile_begin = row > 0 ? row / kRowTile : 0;
    }
  } else {
    int i = 0;
    // A prefix without a gradient has no blocks, and its first_block is that of the next one.
    while (i + 1 < in.prefixes && block >= p.prefix[i + 1].first_block) ++i;
    const PrefixGrad& grad = p.prefix[i];
    block -= grad.first_block;
    const int tile = block % grad.tiles;
    block /= grad.tiles;
    g = block % in.G;
    block /= in.G;
    columns = {in.tiles_from(in.first[i]) + tile * kPrefixTile,
               in.first[i],
               in.first[i] + in.P_i[i],
               in.P,
               i,
               block % in.A_i[i],
               block / in.A_i[i],
               0};
    // The last chunk may have fewer samples.
    const int b_end = (columns.chunk + 1) * grad.chunk_samples;
    range.b_end = b_end < in.B ? b_end : in.B;
    walk.b = next_sample(in, columns, columns.chunk * grad.chunk_samples, range.b_end);
  }
  range.h_begin = g * (in.H / in.G);
  range.h_end = range.h_begin + in.H / in.G;
  if (range.tile_begin >= range.tile_end) walk.b = range.b_end;  // no query sees the columns
  walk.h = range.h_begin;
  walk.tile = range.tile_begin;
  columns.g = g;
  if (thread_index() == 0) {
    s_columns = columns;
    s_range = range;
    s_walk = walk;
  }
  sync_threads();  // thread 0 has written them before any thread reads them
}

}  // namespace pelt::prefix_attention
