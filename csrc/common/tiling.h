// How the rows of an activation [B, S, columns] are cut into tiles, for hosts and devices.
#pragma once

#include <cstdint>

namespace pelt::rows {

constexpr int kThreads = 128;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 64;  // columns of a tile that are in shared memory at a time

// A tile never crosses a group: the sentence, where parameters or a pooled gate differ from one
// sentence to the next, otherwise all rows.
struct Tiling {
  int64_t group_rows = 0;
  int tiles_per_group = 0;
  int tiles = 0;
};

inline Tiling cut_rows(int64_t groups, int64_t group_rows, int tile_rows) {
  Tiling tiling;
  tiling.group_rows = group_rows;
  tiling.tiles_per_group = static_cast<int>((group_rows + tile_rows - 1) / tile_rows);
  tiling.tiles = static_cast<int>(groups) * tiling.tiles_per_group;
  return tiling;
}

// A wave: the tiles that the blocks of a cooperative launch work on together, all of them of whole
// groups, so that a block that waits for its group waits for no tile of a later wave. A group with
// more tiles than there are blocks is a wave of its own, in which blocks have several tiles.
inline int wave_of(const Tiling& tiling, int blocks) {
  const int groups = blocks / tiling.tiles_per_group;
  return (groups > 1 ? groups : 1) * tiling.tiles_per_group;
}

}  // namespace pelt::rows
