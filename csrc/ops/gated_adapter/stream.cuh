// Both products of a tile as one stream of chunks, for the calls that have kernels of their own
// (options.h). A step of either product takes one slot of a ring: a chunk of rows and a chunk of a
// weight. The copies of a step are asked for kStages - 1 steps earlier, across the border between
// the two products, so that neither waits for memory when it starts:
//
//   step      0   1   2   3   4   5   6   7        four chunks of columns
//   rows      x0  x1  x2  x3  r3  r2  r1  r0       x, then the residual
//   weight    d0  d1  d2  d3  u3  u2  u1  u0       W_down, then W_up
//
// The second product walks the columns backwards: what the first one read last is then still in the
// second-level cache. Each thread copies the same places of every chunk, so that an address is the
// one before plus a constant, and whether a row or a rank exists is asked once for a tile.
#pragma once

#include "cuda/rows.cuh"
#include "ops/gated_adapter/configs.h"

namespace pelt::gated_adapter {

static_assert(kPad == kTilePad, "tiles are padded as their fragments are loaded");

// The 16-byte vectors of tiles [kRows, kVectors] that the calling thread copies: kLanes threads are
// beside each other, and the block passes over the rows.
template <class T, int kRows, int kVectors, int kStride, int kThreads>
struct TileSource {
  static constexpr int kLanes = kVectors <= 2 ? 2 : kVectors <= 4 ? 4 : kVectors <= 8 ? 8 : 16;
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr bool kIsWide = kVectors == kLanes;  // each thread has a vector in the first pass

  // Unsigned: a signed index that may be negative costs three more instructions for each division.
  __device__ __forceinline__ static int lane_of_row() {
    return static_cast<uint32_t>(thread_index()) % kLanes;
  }
  __device__ __forceinline__ static int first_row() {
    return static_cast<uint32_t>(thread_index()) / kLanes;
  }

  const unsigned char* from;  // bytes, as all steps are: none is scaled again at every chunk
  int64_t pass_step;
  uint32_t to;  // in the first slot

  // Of a matrix at `matrix` with `leading` elements from row to row, whose tile is at `tile` in the
  // ring's first slot.
  __device__ __forceinline__ TileSource(const T* matrix, int leading, uint32_t tile) {
    const int lane = lane_of_row(), row = first_row();
    from = reinterpret_cast<const unsigned char*>(matrix + static_cast<int64_t>(row) * leading +
                                                  lane * 8);
    pass_step = static_cast<int64_t>(kRowsPerPass) * leading * static_cast<int>(sizeof(T));
    to = tile + (row * kStride + lane * 8) * sizeof(T);
  }

  // Copies the tile `shift` bytes behind `from` to `slot`. With kIsWhole everything exists;
  // without, `rows` and `vectors` do, and the place of what does not gets zeros.
  template <bool kIsWhole>
  __device__ __forceinline__ void copy(uint32_t slot, int64_t shift, int rows, int vectors) const {
    const int lane = lane_of_row(), row = first_row();
    const unsigned char* at = from + shift;
    if (kIsWide || lane < kVectors) {
      for_constants<kPasses>([&](auto i) {
        constexpr int kFirst = decltype(i)::value * kRowsPerPass;
        constexpr int kBytes = kFirst * kStride * static_cast<int>(sizeof(T));
        if (kFirst + kRowsPerPass <= kRows || row + kFirst < kRows) {
          if constexpr (kIsWhole) {
            cp_async_16_at<kBytes>(slot + to, at);
          } else {
            cp_async_16_at<kBytes>(slot + to, at, row + kFirst < rows && lane < vectors ? 16 : 0);
          }
        }
        at += pass_step;
      });
    }
  }
};

template <class C>
using RowsSource = TileSource<typename C::T, C::kTileRows, kChunk / 8, C::kRowStride, C::kThreads>;
template <class C>
using DownSource = TileSource<typename C::T, C::kRanks, kChunk / 8, C::kRowStride, C::kThreads>;
template <class C>
using UpSource = TileSource<typename C::T, kChunk, C::kRanks / 8, C::kRankStride, C::kThreads>;

// Where the calling thread's warp stands in the tile.
template <class C>
__device__ __forceinline__ int first_row() {
  return warp_index() / C::kBesides * C::kRowTiles * 16;
}
template <class C>
__device__ __forceinline__ int first_rank() {
  return warp_index() % C::kRankWarps * C::kRankTiles * 8;
}
template <class C>
__device__ __forceinline__ int half_of_columns() {
  return warp_index() % C::kBesides / C::kRankWarps;
}
template <class C>
__device__ __forceinline__ int first_column() {
  return warp_index() % C::kBesides * C::kColumnTiles * 8;
}

template <class C>
struct Stream {
  using T = typename C::T;
  static constexpr int kSlotBytes = sizeof(Slot<C>);
  static constexpr int kWeightOffset = offsetof(Slot<C>, weight);
  static constexpr int kChunkBytes = kChunk * sizeof(T);

  RowsSource<C> x;  // and the residual, which lies as x does, `residual_shift` further
  DownSource<C> w_down;
  UpSource<C> w_up;
  int row_count, R;
  bool has_residual;
  int64_t residual_shift, up_step;  // bytes; from a chunk of W_up to the next one
  bool is_whole;           // the tile has all of its rows, and the weights all of its ranks
  int down_left, up_left;  // chunks that have not been asked for
  // Slots, in bytes behind the ring's first one: that of the step before, and the next one.
  uint32_t before, read;

  // Of a tile's rows; has_down, has_up: which of the products are wanted now.
  __device__ __forceinline__ Stream(const ForwardParams& p, StreamShared<C>& s,
                                    const TileRows& rows, int64_t down_member, int64_t up_member,
                                    bool has_down, bool has_up)
      : x(p.in.input_as<T>(kX) + rows.first * p.in.D, p.in.D, shared_address(s.slots)),
        w_down(static_cast<const T*>(p.w_down) + down_member * p.in.R * p.in.D, p.in.D,
               shared_address(s.slots) + kWeightOffset),
        w_up(static_cast<const T*>(p.w_up) + up_member * p.in.R * p.in.D +
                 static_cast<int64_t>(p.in.D - kChunk) * p.in.R,
             p.in.R, shared_address(s.slots) + kWeightOffset) {
    const Call& in = p.in;
    row_count = rows.count;
    R = in.R;
    // Where the first product would have left it.
    if (!has_down) x.from += in.D * static_cast<int64_t>(sizeof(T));
    has_residual = in.residual_from != ResidualFrom::kNone;
    residual_shift = p.residual_shift * static_cast<int>(sizeof(T));
    up_step = -static_cast<int64_t>(kChunkBytes) * in.R;
    down_left = has_down ? in.D / kChunk : 0;
    up_left = has_up ? in.D / kChunk : 0;
    is_whole = rows.count == C::kTileRows && in.R == C::kRanks;
    read = before = 0;
#pragma unroll 1
    for (int step = 0; step < C::kStages - 1; ++step) {
      bring<false>(before);
      before += kSlotBytes;
    }
  }

  __device__ __forceinline__ uint32_t after(uint32_t slot) const {
    return slot == (C::kStages - 1) * kSlotBytes ? 0 : slot + kSlotBytes;
  }

  template <bool kIsWhole>
  __device__ __forceinline__ void copy_down(uint32_t slot) {
    x.template copy<kIsWhole>(slot, 0, row_count, kChunk / 8);
    x.from += kChunkBytes;
    w_down.template copy<kIsWhole>(slot, 0, R, kChunk / 8);
    w_down.from += kChunkBytes;
  }

  template <bool kIsWhole>
  __device__ __forceinline__ void copy_up(uint32_t slot) {
    x.from -= kChunkBytes;
    if (has_residual) x.template copy<kIsWhole>(slot, residual_shift, row_count, kChunk / 8);
    w_up.template copy<kIsWhole>(slot, 0, kChunk, R / 8);
    w_up.from += up_step;
  }

  // Asks for the copies of the next step that has not been asked for, which is none of the first
  // product any more where kIsUp.
  template <bool kIsUp>
  __device__ __forceinline__ void bring(uint32_t slot) {
    if (!kIsUp && down_left > 0) {
      --down_left;
      is_whole ? copy_down<true>(slot) : copy_down<false>(slot);
    } else if (up_left > 0) {
      --up_left;
      is_whole ? copy_up<true>(slot) : copy_up<false>(slot);
    }
    cp_async_commit();  // an empty group too: cp_async_wait counts groups
  }

  // The slot of the step that begins.
  template <bool kIsUp>
  __device__ __forceinline__ uint32_t next() {
    cp_async_wait<C::kStages - 2>();  // this thread's copies of the step have landed
    sync_threads();        // and everybody's; nobody reads or writes the slot of the step before
    bring<kIsUp>(before);  // into that slot
    before = read;
    read = after(read);
    return before;
  }
};

// The sums of a warp in the first product: its [16 kRowTiles, its ranks] of x W_down, over its half
// of the columns, and in column 0 of `logits` those of x . w.
template <class C>
struct RankSums {
  FragmentD of[C::kRowTiles][C::kRankTiles];
  FragmentD logits[C::kRowTiles];
};

// The first product. `extra` is w, a row of D elements, or null; the warps with the first ranks
// multiply it.
template <class C>
__device__ __forceinline__ void stream_to_ranks(Stream<C>& stream, const StreamShared<C>& s,
                                                int chunks, const typename C::T* extra,
                                                RankSums<C>& sums) {
  using T = typename C::T;
  constexpr int kRowBytes = C::kRowStride * sizeof(T);
  constexpr int kSteps = kChunk / 16 / C::kHalves;
  const int lane = lane_index();
  const uint32_t half = half_of_columns<C>() * kSteps * 32;  // bytes
  const uint32_t ring = shared_address(s.slots);
  const uint32_t of_a = ring + (first_row<C>() + lane % 16) * kRowBytes + lane / 16 * 16 + half;
  const uint32_t of_b = ring + Stream<C>::kWeightOffset +
                        (first_rank<C>() + lane % 8 + lane / 16 * 8) * kRowBytes +
                        lane / 8 % 2 * 16 + half;
  // One row of eight has elements, the others are zeros at every chunk.
  const bool is_zero = lane % 8 != 0;
  uint32_t of_extra = shared_address(is_zero ? s.zeros : extra) + lane / 8 % 2 * 16 + half;
  const uint32_t extra_step = is_zero ? 0 : kChunk * sizeof(T);
  const bool has_logits = extra != nullptr && first_rank<C>() == 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const uint32_t slot = stream.template next<false>();
    const uint32_t at_a = slot + of_a, at_b = slot + of_b;
    for_constants<kSteps>([&](auto k) {
      constexpr int kColumn = decltype(k)::value * 32;  // bytes
      FragmentA a[C::kRowTiles];
      for_constants<C::kRowTiles>([&](auto m) {
        constexpr int kTile = decltype(m)::value;
        ldmatrix_x4_at<kTile * 16 * kRowBytes + kColumn>(a[kTile].r, at_a);
      });
      for_constants<C::kRankTiles / 2>([&](auto n) {
        constexpr int kTile = 2 * decltype(n)::value;
        uint32_t b[4];
        ldmatrix_x4_at<kTile * 8 * kRowBytes + kColumn>(b, at_b);
        for (int m = 0; m < C::kRowTiles; ++m) {
          multiply_add<T>(sums.of[m][kTile], a[m], FragmentB{{b[0], b[1]}});
          multiply_add<T>(sums.of[m][kTile + 1], a[m], FragmentB{{b[2], b[3]}});
        }
      });
      if constexpr (C::kRankTiles % 2 == 1) {
        constexpr int kTile = C::kRankTiles - 1;
        FragmentB b;
        ldmatrix_x2_at<kTile * 8 * kRowBytes + kColumn>(b.r, at_b);
        for (int m = 0; m < C::kRowTiles; ++m) multiply_add<T>(sums.of[m][kTile], a[m], b);
      }
    });
    if (has_logits) {  // asked once for a chunk: another load of A is less than a branch for each
      for_constants<kSteps>([&](auto k) {
        constexpr int kColumn = decltype(k)::value * 32;
        FragmentB b;
        ldmatrix_x2_at<kColumn>(b.r, of_extra);
        for_constants<C::kRowTiles>([&](auto m) {
          constexpr int kTile = decltype(m)::value;
          FragmentA a;
          ldmatrix_x4_at<kTile * 16 * kRowBytes + kColumn>(a.r, at_a);
          multiply_add<T>(sums.logits[kTile], a, b);
        });
      });
      of_extra += extra_step;
    }
  }
}

// Adds the sums over the second half of the columns to those of the warps with the first half, whose
// sums are then whole.
template <class C>
__device__ __forceinline__ void add_halves(const Stream<C>& stream, StreamShared<C>& s,
                                           RankSums<C>& sums) {
  if constexpr (C::kHalves == 2) {
    constexpr int kTiles = C::kRowTiles * C::kRankTiles;
    const int pair = warp_index() / C::kBesides * C::kRankWarps + warp_index() % C::kRankWarps;
    // The last step's slot, of which each lane has its places.
    unsigned char* slot = reinterpret_cast<unsigned char*>(s.slots) + stream.before;
    float* at = reinterpret_cast<float*>(slot) + (pair * kTiles * 32 + lane_index()) * 4;
    const bool is_second = half_of_columns<C>() == 1;
    sync_threads();  // nobody reads the last step's slot any more
    if (is_second) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float* sum = sums.of[i / C::kRankTiles][i % C::kRankTiles].r;
        store_16(at + i * 32 * 4,
                 {{bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])}});
      }
      if (first_rank<C>() == 0 && FragmentD::column(0) == 0) {
        for (int m = 0; m < C::kRowTiles; ++m) {
          for (int half = 0; half < 2; ++half) {
            s.half_logit[first_row<C>() + 16 * m + FragmentD::row(2 * half)] =
                sums.logits[m].r[2 * half];
          }
        }
      }
    }
    sync_threads();  // the second half's sums are there
    if (is_second) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Words4 other = load_16(at + i * 32 * 4);
      float* sum = sums.of[i / C::kRankTiles][i % C::kRankTiles].r;
      for (int e = 0; e < 4; ++e) sum[e] += float_from_bits(other.word[e]);
    }
  }
}

// The second product, for each chunk of columns from the last to the first: start(sums),
// then finish(first column, slot, sums) with this warp's [16 kRowTiles, 16] of phi(h) W_up
// added to what start has set.
template <class C>
using ColumnSums = FragmentD[C::kRowTiles][C::kColumnTiles];

template <class C, class Start, class Finish>
__device__ __forceinline__ void stream_to_columns(Stream<C>& stream, StreamShared<C>& s, int D,
                                                  Start&& start, Finish&& finish) {
  using T = typename C::T;
  constexpr int kRankBytes = C::kRankStride * sizeof(T);
  const int lane = lane_index();
  FragmentA a[C::kRowTiles][C::kRanks / 16];  // phi(h), the same for every chunk
  const uint32_t of_a =
      shared_address(s.hidden) + (first_row<C>() + lane % 16) * kRankBytes + lane / 16 * 16;
  for_constants<C::kRanks / 16>([&](auto k) {
    constexpr int kStep = decltype(k)::value;
    for_constants<C::kRowTiles>([&](auto m) {
      constexpr int kTile = decltype(m)::value;
      ldmatrix_x4_at<kTile * 16 * kRankBytes + kStep * 32>(a[kTile][kStep].r, of_a);
    });
  });
  const uint32_t of_b = shared_address(s.slots) + Stream<C>::kWeightOffset +
                        (first_column<C>() + lane % 8 + lane / 16 * 8) * kRankBytes +
                        lane / 8 % 2 * 16;
#pragma unroll 1
  for (int first = D - kChunk; first >= 0; first -= kChunk) {
    const uint32_t slot = stream.template next<true>();
    const uint32_t at_b = slot + of_b;
    ColumnSums<C> sums;
    start(sums);
    for_constants<C::kRanks / 16>([&](auto k) {
      constexpr int kStep = decltype(k)::value;
      uint32_t b[4];
      ldmatrix_x4_at<kStep * 32>(b, at_b);
      for (int m = 0; m < C::kRowTiles; ++m) {
        multiply_add<T>(sums[m][0], a[m][kStep], FragmentB{{b[0], b[1]}});
        multiply_add<T>(sums[m][1], a[m][kStep], FragmentB{{b[2], b[3]}});
      }
    });
    finish(first, slot, sums);
  }
}

}  // namespace pelt::gated_adapter
