// The single-launch form: one product with the base weight, and beside it the low-rank branches.
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
// infinite or NaN reaches its own columns only. How the operands come into shared memory is in
// single_operands.cuh.
#pragma once

#include "ops/lora_linear/fragment_dropout.cuh"
#include "ops/lora_linear/single_operands.cuh"

namespace pelt::lora_linear {

// A warp's accumulators.
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

// Where a lane reads the ring's tiles at depth 0 of a chunk; an exclusive or moves it on from there
// (see cuda/swizzle.cuh).
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

// Which slots a chunk has products for: kSlots bits for each 16 of its depth.
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
      // The same for all lanes, so that a warp skips a product together.
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
    // In forward P lies as [ranks, depth], in backward as [depth, ranks].
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

// A chunk's products, with the base weight and with P, from the same fragments of `from`.
template <class C>
__device__ __forceinline__ void multiply_chunk(const SingleParams& p, const SingleShared<C>& s,
                                               const LaneOffsets<C>& lane, int across, int chunk,
                                               SingleSums<C>& sums) {
  using T = typename C::T;
  const int stage = chunk % C::kStages;
  const uint32_t slots_of_steps = slots_of_chunk<C>(s, chunk * C::kDepth);
  // Unrolled: the accumulators are registers only where every index of theirs is a constant.
#pragma unroll
  for (int k = 0; k < C::kDepth; k += 16) {
    // The warp's 64 rows: loaded once, and multiplied by all of its columns of W, and by P.
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
    // No branch has ranks here, or none has columns of dy among these 16: no product with P.
    const uint32_t slots = slots_of_steps >> (k / 16 * C::kSlots) & ((1u << C::kSlots) - 1);
    if (slots == 0) continue;
    // The warps of a row of warps hold the same rows of `from`; each takes 16 of them for P. A
    // choice among registers: an index into the array would put it into local memory.
    FragmentA own = a[0];
#pragma unroll
    for (int m = 1; m < C::kTilesM; ++m) {
      for (int r = 0; r < 4; ++r) own.r[r] = across == m ? a[m].r[r] : own.r[r];
    }
    const T* down = s.ring.down[stage];
    if (C::kIsForward && p.in.dropout.is_active()) {
      // Dropout on the 16 own rows alone: each element of x is drawn for once in the block.
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

// The loop over K. Afterwards the ring's memory may be used anew, and Q is there.
template <class C>
__device__ __forceinline__ void multiply(const SingleParams& p, SingleShared<C>& s,
                                         SingleSums<C>& sums) {
  const int chunks = (p.depth + C::kDepth - 1) / C::kDepth;
  Held held[C::kHeld];  // vectors of P between fetch_down and put_down
  place_block<C>(p, s);
  // The first chunk needs no table, so its copies run while the tables are filled.
  bring_base<C>(p, s, 0);
  fill_tables<C>(p, s);
  // fetch_down and bring_up look up rows that other threads have filled in.
  sync_threads();
  bring_up<C>(p, s);
  // Fills the ring but for one buffer. A group is committed also where there is no chunk left, so
  // that "all but the newest kStages - 2 groups" below always means the chunk of the turn.
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
    // This turn's chunk is there for all threads, and all warps have multiplied the one before,
    // whose buffers are filled anew.
    cp_async_wait<C::kStages - 2>();
    sync_threads();
    const int next = chunk + C::kStages - 1;
    if (next < chunks) {
      bring_base<C>(p, s, next);
      fetch_down<C>(p, s, next, held);
    }
    cp_async_commit();
    // The registers of P are on their way from memory while these products run.
    multiply_chunk<C>(p, s, lane, warp.across, chunk, sums);
    if (next < chunks) put_down<C>(s, next, held);
  }
  // What follows is written where the ring was: no copy is under way and no warp still reads.
  cp_async_wait<0>();
  sync_threads();
}

// The own rows' sums into shared memory, where a lane finds a row's beside each other. Each warp
// writes and reads its own 16 rows, so its lanes alone have to wait for each other.
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
  // A lane reads sums that other lanes of the warp have written.
  sync_warp();
  return out;
}

// Up to eight neighbouring elements of a row of s or ds.
template <class T>
__device__ __forceinline__ void store_ranks(void* memory, int64_t at, int count,
                                            const Float8& values) {
  T* to = static_cast<T*>(memory) + at;
  // A sum of ranks that is no multiple of 8 leaves rows off the 16-byte borders.
  if (count == 8 && at % 8 == 0) {
    store_16(to, narrow<T>(values));
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) to[e] = round_to<T>(values.v[e]);
  }
}

// sums.out += ranks Qt, for what is in shared memory. The caller has had all warps finish their own
// rows of ranks: a warp reads 64 of them.
template <class C>
__device__ __forceinline__ void multiply_up(const SingleParams& p, const SingleShared<C>& s,
                                            const SingleWarp<C>& warp, SingleSums<C>& sums) {
  using T = typename C::T;
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) {
    // 16 rows of the ranks, kept for all columns.
    FragmentA a[C::kSlots];
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      if (slot >= s.slots) break;
      a[slot] = load_a(s.tail.ranks + (warp.row + 16 * m) * C::kRankStride + slot * kSlot,
                       C::kRankStride);
    }
    // 16 columns of the warp's at a time, all slots of ranks for each.
#pragma unroll
    for (int n = 0; n < C::kTilesN; n += 2) {
      const int column = warp.column + 8 * n;
      // Apart from sums.out, because dropout falls on delta alone.
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
        // The branch's columns of y among the block's.
        const int begin = s.slot[slot].offset - s.first, end = begin + s.slot[slot].size;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = column + 8 * half;
          // In backward every branch reaches all of dx.
          if constexpr (C::kIsForward) {
            multiply_columns<T>(delta[half], a[slot], b[half], at, begin, end);
          } else {
            multiply_add<T>(delta[half], a[slot], b[half]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // In backward dropout falls on what comes out of A, in registers, before dy W is added.
        if (!C::kIsForward && p.in.dropout.is_active()) {
          drop_delta(p.in, p.keys, s.rows.first + warp.row + 16 * m, s.first + column + 8 * half,
                     delta[half]);
        }
        for (int i = 0; i < 4; ++i) sums.out[m][n + half].r[i] += delta[half].r[i];
      }
    }
  }
}

// Rounds the tile and stores it in rows of 16-byte vectors. offset_of(column) is added to a whole
// column: the bias.
template <class C, class OffsetOf>
__device__ __forceinline__ void store_out(const SingleParams& p, SingleShared<C>& s,
                                          const SingleWarp<C>& warp, const SingleSums<C>& sums,
                                          OffsetOf&& offset_of) {
  using T = typename C::T;
  // The result is written where sums and ranks were: all warps have read them.
  sync_threads();
#pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    const int column = warp.column + 8 * n + FragmentD::column(0);
    // A lane holds two neighbouring columns, in two rows of each fragment.
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
  // A thread stores whole vectors, of elements that other threads have written.
  sync_threads();
  constexpr int kAcross = C::kColumns / 8;
#pragma unroll
  for (int turn = 0; turn < C::kRows * kAcross / C::kThreads; ++turn) {
    const int i = thread_index() + turn * C::kThreads, row = i / kAcross, column = i % kAcross * 8;
    // Columns come in whole vectors: their number is a multiple of 8 (see why_not).
    if (row >= s.rows.count || s.first + column >= p.columns) continue;
    store_16(static_cast<T*>(p.to) + (s.rows.first + row) * p.columns + s.first + column,
             load_16(s.out + row * C::kOutStride + column));
  }
}

// Calls run(tag, shape) for the first configuration that fits: the one with the fewest ranks.
template <class Configs, class Run>
void run_single(Configs configs, const SingleParams& p, bool has_rows_of_n, int ranks, Run&& run) {
  const bool is_found = run_first_fit(
      configs,
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == p.in.dtype && C::kHasRowsOfN == has_rows_of_n &&
               C::kColumns == p.tile_columns && C::kRanks >= ranks;
      },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        const int blocks = p.tiling.tiles * p.column_tiles;
        run(tag, LaunchShape{blocks, 1, 1, C::kThreads, sizeof(SingleShared<C>)});
      });
  check(is_found, "lora_linear: no configuration of the single launch for ", name_of(p.in.dtype),
        ", ", p.tile_columns, " columns and ", ranks,
        " ranks, which why_not_single should have refused");
}

}  // namespace pelt::lora_linear
