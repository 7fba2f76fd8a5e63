// The single-launch form: one product with the base weight, and the low-rank branches on its back.
//
//   out = from Wt + delta        from [rows, K], Wt [K, N]: x W^T forward, dy W backward
//   sums = from Pt               P: the rows of A and of token gates forward, B^T backward
//   delta = (scale g sums) Qt    Q: B forward, A backward
//
// A block of 8 warps takes 128 rows and 128 columns of out, a warp 64 x 32 of them, or twice the
// columns where there is work enough for all multiprocessors even so:
//
//        from [128, 64]  x  W [64, 128], P [64, ranks]     a ring of kStages buffers by cp.async
//
// The tiles of `from` that are in shared memory for the base product also meet P there: a warp
// multiplies the 16 rows that no other warp of its row of warps takes by P, with a fragment that
// it holds anyway. So the branches cost ranks / 128 (or 256) more matrix work, one more narrow tile
// on the way, and no pass over `from` or `out`. After the loop the ranks of the block's rows are
// rounded, and a few more steps of the same kind add delta to the accumulators, before out is
// rounded once.
//
// Ranks stand in slots of 16 columns, a slot for one branch, so that a branch of which something is
// infinite or NaN reaches its own columns only. A P or Q in float32 is read into registers before a
// chunk is multiplied and rounded and stored after it, so that nobody waits for it.
#pragma once

#include "ops/lora_linear/fragment_dropout.cuh"
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
  union {
    Ring ring;
    Tail tail;
    alignas(16) T out[C::kRows * C::kOutStride];
  };
  alignas(16) T up[C::kUpElements];
  Source source[C::kRanks];  // rows of A and of gates
  SingleSlot slot[C::kSlots];
  // What the whole block knows, here because the loop over K has no registers to spare for it.
  TileRows rows;
  int first;        // its first column
  int slots;        // of branches
  int used;         // of branches and gates
  int gate_column;  // the gates' first
};

template <class C>
struct SingleSums {
  FragmentD out[C::kTilesM][C::kTilesN];
  FragmentD low[C::kRanks / 8];  // the warp's own 16 rows
};

// Where a warp works in the block's tile. Made anew where it is needed: the loop over K has no
// registers for what is needed after it.
template <class C>
struct SingleWarp {
  int across;
  int row;
  int column;
  int own_row;

  __device__ __forceinline__ SingleWarp() {
    constexpr int kAcross = C::kColumns / C::kWarpColumns;
    const int warp = opaque(thread_index()) / 32;
    across = warp % kAcross, row = warp / kAcross * C::kWarpRows;
    column = across * C::kWarpColumns, own_row = row + 16 * across;
  }
};

// Where its lanes read the ring's tiles.
template <class C>
struct LaneOffsets {
  int from;
  int weight;
  int down;

  __device__ __forceinline__ explicit LaneOffsets(const SingleWarp<C>& warp) {
    from = lane_offset_of_a<C::kDepth>(warp.row, 0);
    weight = C::kHasRowsOfN ? lane_offset_of_b_pair<C::kDepth>(warp.column, 0)
                            : lane_offset_of_b_pair_transposed<C::kColumns>(0, warp.column);
    down = C::kIsForward ? lane_offset_of_b_pair<C::kDepth>(0, 0)
                         : lane_offset_of_b_pair_transposed<C::kRanks>(0, 0);
  }
};

// Blocks that run together take tiles that lie together: 16 tiles of rows by as many of columns as
// there are blocks for, so that what one reads of `from` and W the others find in L2.
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
  sync_threads();
}

// Which ranks and gates the block's columns need, and where their factors lie.
template <class C>
__device__ __forceinline__ void fill_tables(const SingleParams& p, SingleShared<C>& s) {
  const Inputs& in = p.in;
  const int i = thread_index();
  SingleSlot own = {};
  own.branch = -1;
  const int first = s.first;
  const int begin = C::kIsForward ? first : 0;
  const int end = C::kIsForward ? first + C::kColumns : in.Dout;
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
  Source source = {};
  if (own.branch >= 0) {
    const Branch& branch = in.branch[own.branch];
    own.factor = branch.b, own.R = branch.R, own.offset = branch.offset, own.size = branch.size;
    own.start =
        member_of(branch.b_index, branch.has_b_index_per_sample, s.rows.group, branch.b_members) *
        branch.size * branch.R;
    const int rank = own.rank + i % kSlot;
    const int64_t member =
        member_of(branch.a_index, branch.has_a_index_per_sample, s.rows.group, branch.a_members);
    if (rank < branch.R) source = {branch.a, (member * branch.R + rank) * in.Din};
  }
  const int gate = i - columns.gate_column;
  if (gate >= 0 && gate < gates) source = {in.gate[gate].gate_weight, 0};
  s.source[i] = source;
  if (i % kSlot == 0) s.slot[i / kSlot] = own;
}

// Eight neighbouring elements of a parameter, of which `count` are there.
struct Eight {
  Parameter source;
  int64_t at;
  int count;
};

// Of the row of A or of a gate's weight that stands at `rank`, from `column` on.
template <class C>
__device__ __forceinline__ Eight eight_of_a(const Inputs& in, const SingleShared<C>& s, int rank,
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

// What comes through registers: 16-bit vectors that lie whole at 16-byte borders (those of A always
// do), and zeros, do not.
struct Held {
  Float8 values;
  int place = -1;  // in the tile, in elements
};

template <class T, bool kIsWhole>
__device__ __forceinline__ void fetch(Held& held, T* tile, int place, const Inputs& in,
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

// Asks for a chunk of P.
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
    if (i >= C::kDownVectors || rank >= s.used * kSlot) continue;
    const int depth = chunk * C::kDepth;
    const Eight from = C::kIsForward ? eight_of_a(p.in, s, row, depth + 8 * vector)
                                     : eight_of_b(s, depth + row, vector);
    fetch<typename C::T, C::kIsForward>(held[turn], tile, swizzled<kLength>(row, vector), p.in,
                                        from);
  }
}

template <class C>
__device__ __forceinline__ void put_down(SingleShared<C>& s, int chunk,
                                         const Held (&held)[C::kHeld]) {
#pragma unroll
  for (int turn = 0; turn < C::kHeld; ++turn) put(held[turn], s.ring.down[chunk % C::kStages]);
}

// Asks for Q.
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

// The slots, as kSlots bits for each 16 of a chunk of the depth, that these say something about.
template <class C>
__device__ __forceinline__ uint32_t slots_of_chunk(const SingleShared<C>& s, int depth) {
  static_assert(C::kSlots * C::kDepth / 16 <= 32, "a bit for each");
  uint32_t slots = 0;
#pragma unroll
  for (int slot = 0; slot < C::kSlots; ++slot) {
    const SingleSlot& of = s.slot[slot];
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      // B has nothing for the columns of dy beside its branch's, which may be NaN.
      const int begin = depth + 16 * step;
      const bool is_near = C::kIsForward || (of.offset < begin + 16 && of.offset + of.size > begin);
      if (slot < s.used && is_near) slots |= 1u << (step * C::kSlots + slot);
    }
  }
  return slots;
}

// sums.low += own rows times a chunk of P, for 16 of its depth. own_of(n) is the fragment that the
// n-th eight columns meet.
template <class C, class OwnOf>
__device__ __forceinline__ void multiply_down(const typename C::T* tile, const LaneOffsets<C>& lane,
                                              uint32_t slots, int k, SingleSums<C>& sums,
                                              OwnOf&& own_of) {
#pragma unroll
  for (int slot = 0; slot < C::kSlots; ++slot) {
    if ((slots >> slot & 1u) == 0) continue;
    FragmentB b[2];
    if constexpr (C::kIsForward) {
      load_b_pair_at<false>(b, tile + (lane.down ^ k) + slot * kSlot * C::kDepth);
    } else {
      load_b_pair_at<true>(b, tile + (lane.down ^ slot * kSlot) + k * C::kRanks);
    }
    multiply_add<typename C::T>(sums.low[2 * slot], own_of(2 * slot), b[0]);
    multiply_add<typename C::T>(sums.low[2 * slot + 1], own_of(2 * slot + 1), b[1]);
  }
}

template <class C>
__device__ __forceinline__ void multiply_chunk(const SingleParams& p, const SingleShared<C>& s,
                                               const LaneOffsets<C>& lane, int across, int chunk,
                                               SingleSums<C>& sums) {
  using T = typename C::T;
  const int stage = chunk % C::kStages;
  const uint32_t slots_of_steps = slots_of_chunk<C>(s, chunk * C::kDepth);
#pragma unroll
  for (int k = 0; k < C::kDepth; k += 16) {
    FragmentA a[C::kTilesM];
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
      a[m] = load_a_at(s.ring.from[stage] + (lane.from ^ k) + 16 * m * C::kDepth);
    }
#pragma unroll
    for (int n = 0; n < C::kTilesN; n += 2) {
      FragmentB b[2];
      if constexpr (C::kHasRowsOfN) {
        load_b_pair_at<false>(b, s.ring.weight[stage] + (lane.weight ^ k) + 8 * n * C::kDepth);
      } else {
        load_b_pair_at<true>(b, s.ring.weight[stage] + (lane.weight ^ 8 * n) + k * C::kColumns);
      }
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
        multiply_add<T>(sums.out[m][n], a[m], b[0]);
        multiply_add<T>(sums.out[m][n + 1], a[m], b[1]);
      }
    }
    const uint32_t slots = slots_of_steps >> (k / 16 * C::kSlots) & ((1u << C::kSlots) - 1);
    if (slots == 0) continue;
    // Chosen among registers, which costs the matrix units nothing.
    FragmentA own = a[0];
#pragma unroll
    for (int m = 1; m < C::kTilesM; ++m) {
      for (int r = 0; r < 4; ++r) own.r[r] = across == m ? a[m].r[r] : own.r[r];
    }
    const T* down = s.ring.down[stage];
    if (C::kIsForward && p.in.dropout.is_active()) {
      const FragmentA dropped =
          drop(p.in, p.keys, own, s.rows.first + SingleWarp<C>().own_row, chunk * C::kDepth + k);
      // The gates see x as it is.
      multiply_down<C>(down, lane, slots, k, sums,
                       [&](int n) { return 8 * n < s.gate_column ? dropped : own; });
    } else {
      multiply_down<C>(down, lane, slots, k, sums, [&](int) { return own; });
    }
  }
}

// The loop over K. Afterwards the ring is free and Q is there.
template <class C>
__device__ __forceinline__ void multiply(const SingleParams& p, SingleShared<C>& s,
                                         SingleSums<C>& sums) {
  const int chunks = (p.depth + C::kDepth - 1) / C::kDepth;
  Held held[C::kHeld];
  place_block<C>(p, s);
  bring_base<C>(p, s, 0);
  fill_tables<C>(p, s);
  sync_threads();
  bring_up<C>(p, s);
#pragma unroll
  for (int chunk = 0; chunk < C::kStages - 1; ++chunk) {
    if (chunk < chunks) {
      if (chunk > 0) bring_base<C>(p, s, chunk);
      fetch_down<C>(p, s, chunk, held);
      put_down<C>(s, chunk, held);
    }
    cp_async_commit();
  }
  const SingleWarp<C> warp;
  const LaneOffsets<C> lane(warp);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<C::kStages - 2>();
    sync_threads();
    // Into the buffers that were used up before the barrier.
    const int next = chunk + C::kStages - 1;
    if (next < chunks) {
      bring_base<C>(p, s, next);
      fetch_down<C>(p, s, next, held);
    }
    cp_async_commit();
    multiply_chunk<C>(p, s, lane, warp.across, chunk, sums);
    if (next < chunks) put_down<C>(s, next, held);
  }
  cp_async_wait<0>();
  sync_threads();
}

// The own rows' sums into shared memory, where a warp finds a row's together.
template <class C>
__device__ __forceinline__ float* spread_sums(SingleShared<C>& s, const SingleWarp<C>& warp,
                                              const SingleSums<C>& sums) {
  float* out = s.tail.sums + warp.own_row * C::kSumStride;
#pragma unroll
  for (int n = 0; n < C::kRanks / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[FragmentD::row(i) * C::kSumStride + 8 * n + FragmentD::column(i)] = sums.low[n].r[i];
    }
  }
  sync_warp();
  return out;
}

// Up to eight neighbouring elements of a row of s or ds.
template <class T>
__device__ __forceinline__ void store_ranks(void* memory, int64_t at, int count,
                                            const Float8& values) {
  T* to = static_cast<T*>(memory) + at;
  if (count == 8 && at % 8 == 0) {
    store_16(to, narrow<T>(values));
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) to[e] = round_to<T>(values.v[e]);
  }
}

// sums.out += ranks Qt, for what is in shared memory.
template <class C>
__device__ __forceinline__ void multiply_up(const SingleParams& p, const SingleShared<C>& s,
                                            const SingleWarp<C>& warp, SingleSums<C>& sums) {
  using T = typename C::T;
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
    FragmentA a[C::kSlots];
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      if (slot >= s.slots) break;
      a[slot] = load_a(s.tail.ranks + (warp.row + 16 * m) * C::kRankStride + slot * kSlot,
                       C::kRankStride);
    }
#pragma unroll
    for (int n = 0; n < C::kTilesN; n += 2) {
      const int column = warp.column + 8 * n;
      FragmentD delta[2];
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) {
        if (slot >= s.slots) break;
        FragmentB b[2];
        if constexpr (C::kIsForward) {
          load_b_pair(b, s.up + column * C::kRankStride + slot * kSlot, C::kRankStride);
        } else {
          load_b_pair_transposed(b, s.up + slot * kSlot * C::kOutStride + column, C::kOutStride);
        }
        const int begin = s.slot[slot].offset - s.first, end = begin + s.slot[slot].size;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = column + 8 * half;
          if constexpr (C::kIsForward) {
            multiply_columns<T>(delta[half], a[slot], b[half], at, begin, end);
          } else {
            multiply_add<T>(delta[half], a[slot], b[half]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!C::kIsForward && p.in.dropout.is_active()) {
          drop_delta(p.in, p.keys, s.rows.first + warp.row + 16 * m, s.first + column + 8 * half,
                     delta[half]);
        }
        for (int i = 0; i < 4; ++i) sums.out[m][n + half].r[i] += delta[half].r[i];
      }
    }
  }
}

// Rounds the tile and stores it in rows of 16-byte vectors. offset_of(column) is what is added to
// a whole column.
template <class C, class OffsetOf>
__device__ __forceinline__ void store_out(const SingleParams& p, SingleShared<C>& s,
                                          const SingleWarp<C>& warp, const SingleSums<C>& sums,
                                          OffsetOf&& offset_of) {
  using T = typename C::T;
  sync_threads();
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    const int column = warp.column + 8 * n + FragmentD::column(0);
    const float low = offset_of(s.first + column), high = offset_of(s.first + column + 1);
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp.row + 16 * m + FragmentD::row(2 * half);
        const float* pair = sums.out[m][n].r + 2 * half;
        store_4(s.out + row * C::kOutStride + column, pack<T>(pair[0] + low, pair[1] + high));
      }
    }
  }
  sync_threads();
  constexpr int kAcross = C::kColumns / 8;
#pragma unroll
  for (int turn = 0; turn < C::kRows * kAcross / C::kThreads; ++turn) {
    const int i = thread_index() + turn * C::kThreads, row = i / kAcross, column = i % kAcross * 8;
    if (row >= s.rows.count || s.first + column >= p.columns) continue;
    store_16(static_cast<T*>(p.to) + (s.rows.first + row) * p.columns + s.first + column,
             load_16(s.out + row * C::kOutStride + column));
  }
}

// Calls run(tag, shape) for the configuration of a list that fits; false if there is none.
template <class Configs, class Run>
bool run_single(Configs configs, const SingleParams& p, bool has_rows_of_n, int ranks, Run&& run) {
  return run_first_fit(
      configs,
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && C::kHasRowsOfN == has_rows_of_n &&
               C::kColumns == p.tile_columns && C::kRanks >= ranks;
      },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        LaunchShape shape;
        shape.threads = C::kThreads;
        shape.shared_bytes = sizeof(SingleShared<C>);
        shape.blocks_x = p.tiling.tiles * p.column_tiles;
        run(tag, shape);
      });
}

}  // namespace pelt::lora_linear
