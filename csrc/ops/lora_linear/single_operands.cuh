// What a block of the single-launch form multiplies (single.cuh): which ranks its columns need,
// where their factors lie, and how tiles of them come into shared memory.
//
// Tiles of `from`, W and P are swizzled (cuda/swizzle.cuh), Q is padded. Vectors of 16-bit elements
// that lie whole at 16-byte borders come by asynchronous copies. The others, of float32 factors and
// of odd ranks, pass through registers in two steps, fetch and put, with a chunk's products between
// them, so that no thread waits for a load from global memory.
//
// A thread copies the same places of every chunk, so its addresses are made once and move on by
// constants. Rows past the end of `from` or W repeat the last one instead of being zeros: what is
// made of them is not stored. Past the end of the depth zeros are needed, in both.
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

// A stage of the ring: a chunk's operands.
template <class C>
struct SingleStage {
  using T = typename C::T;
  alignas(128) T from[C::kRows * C::kDepth];
  alignas(128) T weight[C::kColumns * C::kDepth];
  alignas(128) T down[C::kRanks * C::kDepth];

  static constexpr int kWeight = sizeof(T) * C::kRows * C::kDepth;  // where they begin, in bytes
  static constexpr int kDown = kWeight + sizeof(T) * C::kColumns * C::kDepth;
};

template <class C>
struct SingleShared {
  using T = typename C::T;
  struct Tail {
    alignas(16) float sums[C::kRows * C::kSumStride];
    alignas(16) T ranks[C::kRows * C::kRankStride];
  };
  // One after the other: the ring while `from` is read, then sums and ranks, then the result.
  union {
    alignas(1024) SingleStage<C> ring[C::kStages];
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

// A thread's share of the chunks of `from` and W.
template <class C>
struct BaseCopies {
  using T = typename C::T;
  // Where rows of the depth are copied: of `from`, and of W if it lies as [N, K]. The swizzle repeats
  // after 8 rows, so that one place and a stride serve all turns.
  static constexpr int kVectors = C::kDepth / 8, kStep = C::kThreads / kVectors;
  static constexpr int kTurns = C::kRows / kStep;
  static constexpr int kStepBytes = kStep * C::kDepth * sizeof(T);
  // Where rows of N are copied: of W if it lies as [K, N].
  static constexpr int kVectorsOfN = C::kColumns / 8, kStepOfN = C::kThreads / kVectorsOfN;
  static constexpr int kStepBytesOfN = kStepOfN * C::kColumns * sizeof(T);
  static constexpr int kTurnsOfW = C::kHasRowsOfN ? C::kColumns / kStep : C::kDepth / kStepOfN;
  static_assert(kStep % 8 == 0 && kStepOfN % 8 == 0, "a thread's vectors keep their places");

  const T* from[kTurns];                            // what the next chunk needs
  const T* weight[C::kHasRowsOfN ? kTurnsOfW : 1];  // likewise; of [K, N] rows follow each other
  int64_t weight_step = 0;                          // from one of those rows to the next
  int left;                                         // elements of the depth, from the thread's on
  int weight_left = 0;                              // rows of [K, N], likewise
  uint32_t to;                                      // of the first vector of rows of the depth
  uint32_t weight_to;                               // of the first vector of rows of N

  __device__ __forceinline__ BaseCopies(const SingleParams& p, const SingleShared<C>& s) {
    const int row = thread_index() / kVectors, at = thread_index() % kVectors * 8;
    left = p.depth - at;
    const uint32_t ring = shared_address(s.ring);
    to = kept_address(ring + sizeof(T) * swizzled<C::kDepth>(row, at / 8));
    // A thread whose first vector lies past the end of the depth reads nothing, anywhere.
    const int column = left > 0 ? at : 0;
    const T* first = static_cast<const T*>(p.from) + s.rows.first * p.depth + column;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      from[turn] =
          first + static_cast<int64_t>(no_more(row + turn * kStep, s.rows.count)) * p.depth;
    }
    const T* w = static_cast<const T*>(p.weight);
    if constexpr (C::kHasRowsOfN) {
#pragma unroll
      for (int turn = 0; turn < kTurnsOfW; ++turn) {
        const int n = no_more(s.first + row + turn * kStep, p.columns);
        weight[turn] = w + static_cast<int64_t>(n) * p.depth + column;
      }
      weight_to = to + SingleStage<C>::kWeight;
    } else {
      const int k = thread_index() / kVectorsOfN, vector = thread_index() % kVectorsOfN;
      // Columns come in whole vectors: their number is a multiple of 8 (see why_not).
      const int n = s.first + 8 * vector < p.columns ? s.first + 8 * vector : 0;
      weight[0] = w + static_cast<int64_t>(k) * p.columns + n;
      weight_step = static_cast<int64_t>(kStepOfN) * p.columns;
      weight_left = p.depth - k;
      weight_to = kept_address(ring + SingleStage<C>::kWeight +
                               sizeof(T) * swizzled<C::kColumns>(k, vector));
    }
  }

  // Asks for the next chunk. `stage`: where, in bytes from the ring's first.
  __device__ __forceinline__ void bring(uint32_t stage) {
    const int bytes = left > 0 ? 16 : 0;
    left -= C::kDepth;
    for_constants<kTurns>([&](auto turn) {
      constexpr int i = decltype(turn)::value;
      cp_async_16_at<i * kStepBytes>(to + stage, from[i], bytes);
      from[i] += C::kDepth;
    });
    if constexpr (C::kHasRowsOfN) {
      for_constants<kTurnsOfW>([&](auto turn) {
        constexpr int i = decltype(turn)::value;
        cp_async_16_at<SingleStage<C>::kWeight + i * kStepBytes>(to + stage, weight[i], bytes);
        weight[i] += C::kDepth;
      });
    } else {
      for_constants<kTurnsOfW>([&](auto turn) {
        constexpr int i = decltype(turn)::value;
        cp_async_16_at<i * kStepBytesOfN>(weight_to + stage, weight[0],
                                          weight_left > i * kStepOfN ? 16 : 0);
        weight[0] += weight_step;
      });
      weight_left -= C::kDepth;
    }
  }

 private:
  // A row that is there.
  __device__ __forceinline__ static int no_more(int row, int rows) {
    return row < rows ? row : rows - 1;
  }
};

// A thread's share of the chunks of P, one vector: of a row of A along the depth in forward, of a
// row of B across it in backward. Ranks that are not there come as zeros.
template <class C>
struct DownCopies {
  using T = typename C::T;
  static constexpr int kVectors = (C::kIsForward ? C::kDepth : C::kRanks) / 8;  // in a row

  const char* from = nullptr;  // what the next chunk needs
  int step = 0;                // bytes from chunk to chunk
  int count = 0;               // of the eight elements those that are there
  int row = 0;                 // what is left of the depth; in backward the row of B
  int rows = 0;                // of B
  bool is_ours = false;        // has the thread a vector at all
  bool is_direct = true;       // does it come by an asynchronous copy
  bool is_whole = true;        // at a 16-byte border, as rows of A are
  bool is_float32 = false;
  uint32_t to = 0;
  Float8 held;  // between fetch and put

  __device__ __forceinline__ DownCopies(const SingleParams& p, const SingleShared<C>& s) {
    const int across = thread_index() / kVectors, vector = thread_index() % kVectors;
    to = kept_address(shared_address(s.ring) + SingleStage<C>::kDown +
                      sizeof(T) * swizzled<8 * kVectors>(across, vector));
    // An address that is never read still has to be one of global memory.
    from = static_cast<const char*>(p.from);
    const int rank = C::kIsForward ? across : 8 * vector;
    // Slots that no branch fills are neither read nor multiplied.
    is_ours = thread_index() < C::kRanks * C::kDepth / 8 && rank < s.used * kSlot;
    if (!is_ours) return;
    Parameter source;
    int64_t at, stride;
    if constexpr (C::kIsForward) {
      source = s.source[rank].row, at = s.source[rank].offset + 8 * vector, stride = 1;
      count = source.data != nullptr ? 8 : 0;
      row = p.depth - 8 * vector;
    } else {
      const SingleSlot& slot = s.slot[rank / kSlot];
      const int left = slot.R - slot.rank - rank % kSlot;
      count = slot.branch < 0 || left < 0 ? 0 : left < 8 ? left : 8;
      row = across - slot.offset, rows = slot.size;
      source = slot.factor, stride = slot.R;
      at = slot.start + static_cast<int64_t>(row) * slot.R + slot.rank + rank % kSlot;
      is_whole = count == 8 && slot.R % 8 == 0;
    }
    if (count == 0) return;
    is_float32 = source.is_float32;
    is_direct = is_whole && !is_float32;
    const int size = is_float32 ? sizeof(float) : sizeof(T);
    from = static_cast<const char*>(source.data) + at * size;
    step = static_cast<int>(C::kDepth * stride * size);
  }

  // Asks for the next chunk's vector, or leaves it in registers for put().
  __device__ __forceinline__ void fetch(uint32_t stage) {
    if (!is_ours) return;
    const bool is_there =
        C::kIsForward ? row > 0 : static_cast<unsigned>(row) < static_cast<unsigned>(rows);
    row += C::kIsForward ? -C::kDepth : C::kDepth;
    if (is_direct) {
      cp_async_16_at<0>(to + stage, from, is_there && count > 0 ? 16 : 0);
    } else {
      held = is_there ? load_some() : Float8{};
    }
    from += step;
  }

  // Stores what fetch() left in registers.
  __device__ __forceinline__ void put(uint32_t stage) const {
    if (is_ours && !is_direct) store_shared_16(to + stage, narrow<T>(held));
  }

 private:
  __device__ __forceinline__ Float8 load_some() const {
    const Parameter source{from, is_float32};
    if (is_whole) return load_parameter_8<T>(source, 0);
    Float8 values = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) values.v[e] = load_parameter<T>(source, e);
    }
    return values;
  }
};

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
