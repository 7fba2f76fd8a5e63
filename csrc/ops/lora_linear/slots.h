// How the single-launch form stacks the ranks of several branches beside each other, for hosts and
// devices.
#pragma once

#include "ops/lora_linear/params.h"

namespace pelt::lora_linear {

constexpr int kSlot = 16;  // columns of a branch's ranks that stand together
// Columns of a block's tile: as a rule 128; or, with ranks for one slot, more or fewer.
constexpr int kSingleSmallColumns = 64;
constexpr int kSingleColumns = 128;
constexpr int kSingleWideColumns = 256;

// Rows of a tile with so many columns.
constexpr int single_rows(int columns) { return columns == kSingleSmallColumns ? 64 : 128; }

constexpr int kSingleRanks = 64;  // that a block has room for, slots and gates together

struct RankColumns {
  int slots = 0;        // filled with ranks
  int gate_column = 0;  // the first that gates may take: the next multiple of 8
};

PELT_HOST_DEVICE bool overlaps(const Branch& branch, int begin, int end) {
  return branch.offset < end && branch.offset + branch.size > begin;
}

// Calls visit(slot, branch, its first rank in the slot) for the branches that reach columns of y in
// [begin, end).
template <class Visit>
PELT_HOST_DEVICE RankColumns for_each_slot(const Linear& in, int begin, int end, Visit&& visit) {
  RankColumns columns;
  for (int i = 0; i < in.branches; ++i) {
    const Branch& branch = in.branch[i];
    if (!overlaps(branch, begin, end)) continue;
    for (int rank = 0; rank < branch.R; rank += kSlot) visit(columns.slots++, i, rank);
    columns.gate_column = columns.slots * kSlot;
    if (branch.R % kSlot > 0 && branch.R % kSlot <= 8) columns.gate_column -= 8;
  }
  return columns;
}

// Does a block with columns [begin, end) of y compute the gates: those of its branches, and the
// extra ones in the first block.
PELT_HOST_DEVICE bool needs_gates(const Linear& in, int begin, int end) {
  for (int g = 0; g < in.gates; ++g) {
    const int branch = in.gate[g].branch;
    if (branch < 0 ? begin == 0 : overlaps(in.branch[branch], begin, end)) return true;
  }
  return false;
}

}  // namespace pelt::lora_linear
