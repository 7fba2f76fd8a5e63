// What a block of the single-launch form multiplies (single.cuh): which ranks its columns need,
// where their factors lie, and how tiles of them come into shared memory.
//
// Tiles of `from`, W and P are swizzled (cuda/swizzle.cuh), Q is padded. Vectors of 16-bit elements
// that lie whole at 16-byte borders come by asynchronous copies. The others, of float32 factors and
// of odd ranks, pass through registers in two steps, fetch and put, with a chunk's products between
// them, so that no thread waits for a load from global memory.
#pragma once

#include "ops/lora_linear/single_config.cuh"
#include "ops/lora_linear/slots.h"
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {

// A slot of the block's, and where its branch's B lies.
struct SingleSlot {
  Parameter factor;  // B
  int64_t start;     // of the member that serves these rows
  int branch;        // -1: nothing
  int rank;          // the slot's first
  int R;
  int offset;
  int size;
};

template <class C>
struct SingleShared {
  using T = typename C::T;
  struct Ring {
    alignas(128) T from[C::kStages][C::kRows * C::kDepth];
    alignas(128) T weight[C::kStages][C::kColumns * C::kDepth];
    alignas(128) T down[C::kStages][C::kRanks * C::kDepth];
  };
  struct Tail {
    alignas(16) float sums[C::kRows * C::kSumStride];
    alignas(16) T ranks[C::kRows * C::kRankStride];
  };
  // One after the other: the ring while `from` is read, then sums and ranks, then the result.
  union {
    Ring ring;
    Tail tail;
    alignas(16) T out[C::kRows * C::kOutStride];
  };
  alignas(16) T up[C::kUpElements];  // Q, beside the ring: it is asked for before the loop
  Source source[C::kRanks];          // rows of A and of gates
  SingleSlot slot[C::kSlots];
  // What the whole block knows, here because the loop over K has no registers to spare for it.
  TileRows rows;
  int first;        // its first column
  int slots;        // of branches
  int used;         // of branches and gates
  int gate_column;  // the gates' first
};

// Which tile of `out` the block has. Blocks that run together take tiles that lie together: 16
// tiles of rows by as many of columns as there are blocks for, so that what one reads of `from` and
// W the others find in L2.
template <class C>
__device__ __forceinline__ void place_block(const SingleParams& p, SingleShared<C>& s) {
  if (thread_index() == 0) {
    constexpr int kTogether = 16;
    const int block = block_index_x();
    const int group = block / (kTogether * p.column_tiles), first = group * kTogether;
    const int left = p.tiling.tiles - first, together = left < kTogether ? left : kTogether;
    const int inside = block - group * kTogether * p.column_tiles;
    s.rows = rows_of_tile<C::kRows>(p.tiling, first + inside % together);
    s.first = inside / together * C::kColumns;
  }
  // All threads read the block's rows and columns from now on.
  sync_threads();
}

// Which ranks and gates the block's columns need, and where their factors lie.
template <class C>
__device__ __forceinline__ void fill_tables(const SingleParams& p, SingleShared<C>& s) {
  const Linear& in = p.in;
  const int i = thread_index();
  SingleSlot own = {};
  own.branch = -1;
  const int first = s.first;
  // In forward the branches that reach the block's columns of y; in backward, where dx is of all
  // branches, every one.
  const int begin = C::kIsForward ? first : 0;
  const int end = C::kIsForward ? first + C::kColumns : in.Dout;
  // Every thread walks the same list and keeps the slot that is its own.
  RankColumns columns = for_each_slot(in, begin, end, [&](int slot, int branch, int rank) {
    if (slot == i / kSlot) own.branch = branch, own.rank = rank;
  });
  const int gates = C::kIsForward && needs_gates(in, first, first + C::kColumns) ? in.gates : 0;
  if (i == 0) {
    s.slots = columns.slots;
    s.gate_column = columns.gate_column;
    s.used = (columns.gate_column + gates + kSlot - 1) / kSlot;
  }
  if (i >= C::kRanks) return;
  // From here on a thread for each column of sums: the row of A, or the gate's weight, behind it.
  Source source = {};
  if (own.branch >= 0) {
    const Branch& branch = in.branch[own.branch];
    own.factor = branch.b, own.R = branch.R, own.offset = branch.offset, own.size = branch.size;
    own.start = member_of_b(branch, s.rows.group) * branch.size * branch.R;
    const int rank = own.rank + i % kSlot;
    const int64_t member = member_of_a(branch, s.rows.group);
    if (rank < branch.R) source = {branch.a, (member * branch.R + rank) * in.Din};
  }
  const int gate = i - columns.gate_column;
  if (gate >= 0 && gate < gates) source = {in.gate[gate].weight, 0};
  s.source[i] = source;
  if (i % kSlot == 0) s.slot[i / kSlot] = own;
}

// Eight neighbouring elements of a parameter, of which the first `count` exist.
struct Eight {
  Parameter source;
  int64_t at;
  int count;
};

// Of the row of A or of a gate's weight that stands at `rank`, from `column` on.
template <class C>
__device__ __forceinline__ Eight eight_of_a(const Linear& in, const SingleShared<C>& s, int rank,
                                            int column) {
  const Source& source = s.source[rank];
  const bool is_there = source.row.data != nullptr && column < in.Din;
  return {source.row, source.offset + column, is_there ? 8 : 0};
}

// Of B's row for a column of y: ranks [8 * vector, 8 * vector + 8) of the block's.
template <class C>
__device__ __forceinline__ Eight eight_of_b(const SingleShared<C>& s, int column, int vector) {
  const SingleSlot& slot = s.slot[vector * 8 / kSlot];
  const int row = column - slot.offset, rank = slot.rank + vector * 8 % kSlot;
  const bool is_there = slot.branch >= 0 && row >= 0 && row < slot.size && rank < slot.R;
  const int left = slot.R - rank;
  return {slot.factor, slot.start + static_cast<int64_t>(row) * slot.R + rank,
          is_there ? (left < 8 ? left : 8) : 0};
}

// Eight elements on their way through registers.
struct Held {
  Float8 values;
  int place = -1;  // in the tile, in elements
};

// Copies eight elements to `place` of the tile, or leaves them in `held` for put(). kIsWhole: they
// lie at a 16-byte border or are not there at all, as those of A do.
template <class T, bool kIsWhole>
__device__ __forceinline__ void fetch(Held& held, T* tile, int place, const Linear& in,
                                      const Eight& from) {
  held.place = -1;
  const bool is_whole = kIsWhole || (from.count == 8 && from.at % 8 == 0);
  if (from.count == 0 || (is_whole && !from.source.is_float32)) {
    // An address that is never read still has to be one of global memory.
    const T* address = from.count == 0 ? static_cast<const T*>(in.x)
                                       : static_cast<const T*>(from.source.data) + from.at;
    cp_async_16(tile + place, address, from.count != 0);
    return;
  }
  held.place = place;
  held.values = {};
  if (is_whole) {
    held.values = load_parameter_8<T>(from.source, from.at);
  } else if constexpr (!kIsWhole) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < from.count) held.values.v[e] = load_parameter<T>(from.source, from.at + e);
    }
  }
}

template <class T>
__device__ __forceinline__ void put(const Held& held, T* tile) {
  if (held.place >= 0) store_16(tile + held.place, narrow<T>(held.values));
}

// Asks for kRows x kLength elements of a matrix that begin at (row, column); beyond `rows` and
// `columns` there is nothing.
template <class C, int kRows, int kLength>
__device__ __forceinline__ void bring(typename C::T* tile, const void* matrix, int64_t row,
                                      int column, int rows, int columns) {
  using T = typename C::T;
  constexpr int kVectors = kLength / 8, kStep = C::kThreads / kVectors;
  // The swizzle repeats after 8 rows, so that one address and a stride serve all turns.
  static_assert(kStep % 8 == 0, "a thread's vectors keep their places from turn to turn");
  // Addresses are made anew for each chunk: kept in registers they would crowd out the sums.
  const int thread = opaque(thread_index());
  const int own_row = thread / kVectors, vector = thread % kVectors;
  const int own_column = column + 8 * vector;
  const T* from = static_cast<const T*>(matrix) + (row + own_row) * columns + own_column;
  T* to = tile + swizzled<kLength>(own_row, vector);
  const int left = own_column < columns ? rows - own_row : 0;
#pragma unroll
  for (int turn = 0; turn < kRows / kStep; ++turn) {
    cp_async_16(to + turn * kStep * kLength, from + static_cast<int64_t>(turn * kStep) * columns,
                turn * kStep < left);
  }
}

// Asks for a chunk of `from` and of the weight.
template <class C>
__device__ __forceinline__ void bring_base(const SingleParams& p, SingleShared<C>& s, int chunk) {
  const int stage = chunk % C::kStages, depth = chunk * C::kDepth;
  bring<C, C::kRows, C::kDepth>(s.ring.from[stage], p.from, s.rows.first, depth, s.rows.count,
                                p.depth);
  if constexpr (C::kHasRowsOfN) {
    bring<C, C::kColumns, C::kDepth>(s.ring.weight[stage], p.weight, s.first, depth,
                                     p.columns - s.first, p.depth);
  } else {
    bring<C, C::kDepth, C::kColumns>(s.ring.weight[stage], p.weight, depth, s.first,
                                     p.depth - depth, p.columns);
  }
}

// Asks for a chunk of P: in forward rows of A along the depth, in backward rows of B across it.
template <class C>
__device__ __forceinline__ void fetch_down(const SingleParams& p, SingleShared<C>& s, int chunk,
                                           Held (&held)[C::kHeld]) {
  constexpr int kLength = C::kIsForward ? C::kDepth : C::kRanks;
  auto* tile = s.ring.down[chunk % C::kStages];
  const int thread = opaque(thread_index());
#pragma unroll
  for (int turn = 0; turn < C::kHeld; ++turn) {
    held[turn].place = -1;
    const int i = thread + turn * C::kThreads;
    const int row = i / (kLength / 8), vector = i % (kLength / 8);
    const int rank = C::kIsForward ? row : 8 * vector;
    // Slots that no branch fills are neither read nor multiplied.
    if (i >= C::kDownVectors || rank >= s.used * kSlot) continue;
    const int depth = chunk * C::kDepth;
    const Eight from = C::kIsForward ? eight_of_a(p.in, s, row, depth + 8 * vector)
                                     : eight_of_b(s, depth + row, vector);
    fetch<typename C::T, C::kIsForward>(held[turn], tile, swizzled<kLength>(row, vector), p.in,
                                        from);
  }
}

// Stores what fetch_down left in registers.
template <class C>
__device__ __forceinline__ void put_down(SingleShared<C>& s, int chunk,
                                         const Held (&held)[C::kHeld]) {
#pragma unroll
  for (int turn = 0; turn < C::kHeld; ++turn) put(held[turn], s.ring.down[chunk % C::kStages]);
}

// Asks for Q. Once for a block and before the loop, so its registers are stored at once.
template <class C>
__device__ __forceinline__ void bring_up(const SingleParams& p, SingleShared<C>& s) {
  constexpr int kRows = C::kIsForward ? C::kColumns : C::kRanks;
  constexpr int kLength = C::kIsForward ? C::kRanks : C::kColumns;
  constexpr int kStride = C::kIsForward ? C::kRankStride : C::kOutStride;
  for (int i = thread_index(); i < kRows * kLength / 8; i += C::kThreads) {
    const int row = i / (kLength / 8), vector = i % (kLength / 8);
    const int rank = C::kIsForward ? 8 * vector : row;
    if (rank >= s.slots * kSlot) continue;
    const Eight from = C::kIsForward ? eight_of_b(s, s.first + row, vector)
                                     : eight_of_a(p.in, s, row, s.first + 8 * vector);
    Held held;
    fetch<typename C::T, !C::kIsForward>(held, s.up, row * kStride + 8 * vector, p.in, from);
    put(held, s.up);
  }
}

}  // namespace pelt::lora_linear
