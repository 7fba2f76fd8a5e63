// The single-launch form: one product with the base weight, and beside it the low-rank branches.
//
//   out = from Wt + delta        from [rows, K], Wt [K, N]: x W^T forward, dy W backward
//   sums = from Pt               P: the rows of A and of token gates forward, B^T backward
//   delta = (scale g sums) Qt    Q: B forward, A backward
//
// A block of 4 warps takes 128 rows and 128 columns of out, a warp 64 x 64 of them. There are wider
// and smaller blocks; launch.cpp takes the one whose tiles cost the busiest multiprocessor least:
//
//        from [128, 32]  x  W [32, 128], P [32, ranks]     a ring of kStages buffers by cp.async
//
// The tiles of `from` that are in shared memory for the base product also meet P there: the warps
// of a row of warps hold the same rows, and each multiplies its share of them by P, with fragments
// that it holds anyway. So the branches cost ranks / 128 more matrix work, one more narrow tile on
// the way, and no pass over `from` or `out`. After the loop the ranks of the block's rows are
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
  FragmentD low[C::kOwnTiles][C::kRanks / 8];  // the warp's own rows
};

// Where a warp works in the block's tile. Made anew where it is needed: the loop over K has no
// registers for what is needed after it.
template <class C>
struct SingleWarp {
  int across;
  int row;
  int column;
  int own_row;  // the first of those that the warp multiplies by P

  __device__ __forceinline__ SingleWarp() {
    const int warp = opaque(thread_index()) / 32;
    across = warp % C::kAcross, row = warp / C::kAcross * C::kWarpRows;
    column = across * C::kWarpColumns, own_row = row + across * C::kOwnRows;
  }

  // Of the fragments of group g, which are the own ones first: a warp's own rows are then in the
  // same registers whichever warp it is.
  __device__ __forceinline__ int row_of_group(int g) const {
    return row + (g ^ across) * C::kOwnRows;
  }
  __device__ __forceinline__ int row_of(int m) const {
    return row_of_group(m / C::kOwnTiles) + m % C::kOwnTiles * 16;
  }
};

// Where a lane reads the tiles of the ring's first stage, at depth 0 of the chunk; an exclusive or
// moves it on from there (see cuda/swizzle.cuh).
template <class C>
struct LaneAddresses {
  uint32_t from[C::kAcross];  // of the groups' first fragments
  uint32_t weight;
  uint32_t down;

  __device__ __forceinline__ LaneAddresses(const SingleShared<C>& s, const SingleWarp<C>& warp) {
    using T = typename C::T;
    const uint32_t ring = shared_address(s.ring);
#pragma unroll
    for (int g = 0; g < C::kAcross; ++g) {
      from[g] =
          kept_address(ring + sizeof(T) * lane_offset_of_a<C::kDepth>(warp.row_of_group(g), 0));
    }
    const int of_weight = C::kHasRowsOfN
                              ? lane_offset_of_b_pair<C::kDepth>(warp.column, 0)
                              : lane_offset_of_b_pair_transposed<C::kColumns>(0, warp.column);
    weight = kept_address(ring + SingleStage<C>::kWeight + sizeof(T) * of_weight);
    const int of_down = C::kIsForward ? lane_offset_of_b_pair<C::kDepth>(0, 0)
                                      : lane_offset_of_b_pair_transposed<C::kRanks>(0, 0);
    down = kept_address(ring + SingleStage<C>::kDown + sizeof(T) * of_down);
  }
};

// Which slots have products with P: kSlots bits for each 16 of a chunk's depth.
template <class C>
struct SlotsOfChunk {
  static constexpr int kSteps = C::kDepth / 16;
  static_assert(C::kSlots * kSteps <= 32, "a bit for each");
  uint32_t all = 0;           // where the chunk lies inside of every branch's columns
  bool is_everywhere = true;  // is that every chunk

  __device__ __forceinline__ SlotsOfChunk(const SingleParams& p, const SingleShared<C>& s) {
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      if (slot >= s.used) break;
      for (int step = 0; step < kSteps; ++step) all |= 1u << (step * C::kSlots + slot);
      const SingleSlot& of = s.slot[slot];
      // In forward the depth is that of x, which every branch meets as a whole.
      if (!C::kIsForward) is_everywhere &= of.offset == 0 && of.size == p.depth;
    }
  }

  __device__ __forceinline__ uint32_t at(const SingleShared<C>& s, int chunk) const {
    if (C::kIsForward || is_everywhere) return all;
    uint32_t slots = 0;
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      if (slot >= s.used) break;
      const SingleSlot& of = s.slot[slot];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        // B has nothing for the columns of dy beside its branch's, which may be NaN.
        const int begin = chunk * C::kDepth + 16 * step;
        if (of.offset < begin + 16 && of.offset + of.size > begin) {
          slots |= 1u << (step * C::kSlots + slot);
        }
      }
    }
    return slots;
  }
};

// sums.low += own rows times a chunk of P, for 16 of its depth from kAt on. own_of(i, n) is the
// fragment of the i-th 16 rows that the n-th eight columns meet.
template <class C, int kAt, class OwnOf>
__device__ __forceinline__ void multiply_down(uint32_t down, uint32_t slots, SingleSums<C>& sums,
                                              OwnOf&& own_of) {
  using T = typename C::T;
  for_constants<C::kSlots>([&](auto constant) {
    constexpr int slot = decltype(constant)::value;
    if (C::kSlots > 1 && (slots >> slot & 1u) == 0) return;
    // In forward P lies as [ranks, depth], in backward as [depth, ranks].
    FragmentB b[2];
    if constexpr (C::kIsForward) {
      load_b_pair_at<false, sizeof(T) * slot * kSlot * C::kDepth>(b, down ^ (sizeof(T) * kAt));
    } else {
      load_b_pair_at<true, sizeof(T) * kAt * C::kRanks>(b, down ^ (sizeof(T) * slot * kSlot));
    }
#pragma unroll
    for (int i = 0; i < C::kOwnTiles; ++i) {
      multiply_add<T>(sums.low[i][2 * slot], own_of(i, 2 * slot), b[0]);
      multiply_add<T>(sums.low[i][2 * slot + 1], own_of(i, 2 * slot + 1), b[1]);
    }
  });
}

// A chunk's products, with the base weight and with P, from the same fragments of `from`. `stage`:
// where the chunk lies, in bytes from the ring's first; `slots_of_steps`: see SlotsOfChunk.
template <class C>
__device__ __forceinline__ void multiply_chunk(const SingleParams& p, const SingleShared<C>& s,
                                               const LaneAddresses<C>& lane, uint32_t stage,
                                               int chunk, uint32_t slots_of_steps, bool is_dropped,
                                               SingleSums<C>& sums) {
  using T = typename C::T;
  for_constants<C::kDepth / 16>([&](auto step) {
    constexpr int kAt = 16 * decltype(step)::value, kBytes = sizeof(T) * kAt;
    // The warp's rows: loaded once, and multiplied by all of its columns of W, and by P.
    FragmentA a[C::kTilesM];
    for_constants<C::kTilesM>([&](auto constant) {
      constexpr int m = decltype(constant)::value, kRow = m % C::kOwnTiles * 16;
      a[m] =
          load_a_at<sizeof(T) * kRow * C::kDepth>((lane.from[m / C::kOwnTiles] + stage) ^ kBytes);
    });
    for_constants<C::kTilesN / 2>([&](auto constant) {
      constexpr int n = 2 * decltype(constant)::value;
      FragmentB b[2];
      if constexpr (C::kHasRowsOfN) {
        load_b_pair_at<false, sizeof(T) * 8 * n * C::kDepth>(b, (lane.weight + stage) ^ kBytes);
      } else {
        load_b_pair_at<true, kBytes * C::kColumns>(b, (lane.weight + stage) ^ (sizeof(T) * 8 * n));
      }
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
        multiply_add<T>(sums.out[m][n], a[m], b[0]);
        multiply_add<T>(sums.out[m][n + 1], a[m], b[1]);
      }
    });
    // No branch has ranks here, or none has columns of dy among these 16: no product with P.
    const uint32_t slots = slots_of_steps >> (kAt / 16 * C::kSlots) & ((1u << C::kSlots) - 1);
    if (slots == 0) return;
    if (C::kIsForward && is_dropped) {
      // Dropout on the own rows alone: each element of x is drawn for once in the block.
      FragmentA dropped[C::kOwnTiles];
#pragma unroll
      for (int i = 0; i < C::kOwnTiles; ++i) {
        const int64_t row = s.rows.first + SingleWarp<C>().own_row + 16 * i;
        dropped[i] = drop(p.in, p.keys, a[i], row, chunk * C::kDepth + kAt);
      }
      // The gates see x as it is.
      multiply_down<C, kAt>(lane.down + stage, slots, sums, [&](int i, int n) {
        return 8 * n < s.gate_column ? dropped[i] : a[i];
      });
    } else {
      multiply_down<C, kAt>(lane.down + stage, slots, sums, [&](int i, int) { return a[i]; });
    }
  });
}

// The loop over K. Afterwards the ring's memory may be used anew, and Q is there.
template <class C>
__device__ __forceinline__ void multiply(const SingleParams& p, SingleShared<C>& s,
                                         SingleSums<C>& sums) {
  constexpr int kStage = sizeof(SingleStage<C>);
  const int chunks = (p.depth + C::kDepth - 1) / C::kDepth;
  place_block<C>(p, s);
  BaseCopies<C> base(p, s);
  // The first chunk needs no table, so its copies run while the tables are filled.
  base.bring(0);
  fill_tables<C>(p, s);
  // DownCopies and bring_up look up rows that other threads have filled in.
  sync_threads();
  bring_up<C>(p, s);
  DownCopies<C> down(p, s);
  // Fills the ring but for one buffer. A group is committed also where there is no chunk left, so
  // that "all but the newest kStages - 2 groups" below always means the chunk of the turn.
#pragma unroll
  for (int chunk = 0; chunk < C::kStages - 1; ++chunk) {
    if (chunk < chunks) {
      if (chunk > 0) base.bring(chunk * kStage);
      down.fetch(chunk * kStage);
      down.put(chunk * kStage);
    }
    cp_async_commit();
  }
  const LaneAddresses<C> lane(s, SingleWarp<C>{});
  const SlotsOfChunk<C> slots(p, s);
  const bool is_dropped = p.in.dropout.is_active();
  // The stages of this turn's chunk and of the newest one, in bytes from the ring's first.
  uint32_t stage = 0, newest = (C::kStages - 1) * kStage;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    // This turn's chunk is there for all threads, and all warps have multiplied the one before,
    // whose buffers are filled anew.
    cp_async_wait<C::kStages - 2>();
    sync_threads();
    const bool has_next = chunk + C::kStages - 1 < chunks;
    if (has_next) {
      base.bring(newest);
      down.fetch(newest);
    }
    cp_async_commit();
    // The registers of P are on their way from memory while these products run.
    multiply_chunk<C>(p, s, lane, stage, chunk, slots.at(s, chunk), is_dropped, sums);
    if (has_next) down.put(newest);
    newest = stage;
    stage = stage == (C::kStages - 1) * kStage ? 0 : stage + kStage;
  }
  // What follows is written where the ring was: no copy is under way and no warp still reads.
  cp_async_wait<0>();
  sync_threads();
}

// The own rows' sums into shared memory, where a lane finds a row's beside each other. Each warp
// writes and reads its own rows, so its lanes alone have to wait for each other.
template <class C>
__device__ __forceinline__ float* spread_sums(SingleShared<C>& s, const SingleWarp<C>& warp,
                                              const SingleSums<C>& sums) {
  float* out = s.tail.sums + warp.own_row * C::kSumStride;
#pragma unroll
  for (int t = 0; t < C::kOwnTiles; ++t) {
#pragma unroll
    for (int n = 0; n < C::kRanks / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[(16 * t + FragmentD::row(i)) * C::kSumStride + 8 * n + FragmentD::column(i)] =
            sums.low[t][n].r[i];
      }
    }
  }
  // A lane reads sums that other lanes of the warp have written.
  sync_warp();
  return out;
}

// sums.out += ranks Qt, for what is in shared memory. The caller has had all warps finish their own
// rows of ranks: a warp reads those of its whole tile.
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
      a[slot] =
          load_a(s.tail.ranks + warp.row_of(m) * C::kRankStride + slot * kSlot, C::kRankStride);
    }
    // 16 columns of the warp's at a time, all slots of ranks for each.
#pragma unroll
    for (int n = 0; n < C::kTilesN; n += 2) {
      const int column = warp.column + 8 * n;
      // In backward apart from sums.out, because dropout falls on delta alone.
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
          // In backward every branch reaches all of dx.
          if constexpr (C::kIsForward) {
            multiply_columns<T>(sums.out[m][n + half], a[slot], b[half], column + 8 * half, begin,
                                end);
          } else {
            multiply_add<T>(delta[half], a[slot], b[half]);
          }
        }
      }
      if constexpr (!C::kIsForward) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // On what comes out of A, in registers, before dy W is added.
          if (p.in.dropout.is_active()) {
            drop_delta(p.in, p.keys, s.rows.first + warp.row_of(m), s.first + column + 8 * half,
                       delta[half]);
          }
          for (int i = 0; i < 4; ++i) sums.out[m][n + half].r[i] += delta[half].r[i];
        }
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
        const int row = warp.row_of(m) + FragmentD::row(2 * half);
        const float* pair = sums.out[m][n].r + 2 * half;
        store_4(s.out + row * C::kOutStride + column, pack<T>(pair[0] + low, pair[1] + high));
      }
    }
  }
  // A thread stores whole vectors, of elements that other threads have written.
  sync_threads();
  constexpr int kVectors = C::kColumns / 8, kStep = C::kThreads / kVectors;
  const int first_row = thread_index() / kVectors, column = thread_index() % kVectors * 8;
  // Columns come in whole vectors: their number is a multiple of 8 (see why_not).
  const int left = s.first + column < p.columns ? s.rows.count - first_row : 0;
  T* to = static_cast<T*>(p.to) + (s.rows.first + first_row) * p.columns + s.first + column;
  const T* from = s.out + first_row * C::kOutStride + column;
#pragma unroll
  for (int row = 0; row < C::kRows; row += kStep) {
    if (row < left) store_16(to, load_16(from + row * C::kOutStride));
    to += static_cast<int64_t>(kStep) * p.columns;
  }
}

// Calls run(tag, shape) for the first configuration that fits: the one with the fewest ranks.
template <class Configs, class Run>
void run_single(Configs configs, const SingleParams& p, bool has_rows_of_n, int ranks, Run&& run) {
  const bool is_found = run_first_fit_here<SingleShared>(
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
