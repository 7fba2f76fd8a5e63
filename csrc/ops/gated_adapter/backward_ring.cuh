// How the chunks that a tile's passes over the columns take come into shared memory, in the listed
// kernels of backward's first launch:
//
//   pass      logits      up               down
//   rows      x0  x1  x2  dy0 dy1 dy2      dy2 dy1 dy0
//   weight    -   -   -   u0  u1  u2       d2  d1  d0       W_up, W_down
#pragma once

#include "ops/gated_adapter/backward_configs.h"
#include "ops/gated_adapter/tiles.cuh"

namespace pelt::gated_adapter {

// What a block brings for a tile, in this order.
struct Passes {
  bool logits;  // over x
  bool up;      // over dy and W_up
  bool down;    // over W_down, and dy once more
};

// Copies this thread's vectors of a tile [kRows, kVectors]: kLanes threads are beside each other, and
// the block passes over the rows. `from` is the thread's own first vector. With kIsWhole everything
// exists; without, the place of rows and vectors beyond `rows` and `vectors` gets zeros.
template <class C, int kRows, int kVectors, int kStride>
struct TileCopy {
  using T = typename C::T;
  static constexpr int kLanes = kVectors <= 2 ? 2 : kVectors <= 4 ? 4 : kVectors <= 8 ? 8 : 16;
  static constexpr int kRowsOfPass = C::kThreads / kLanes;
  static constexpr int kPasses = (kRows + kRowsOfPass - 1) / kRowsOfPass;

  __device__ __forceinline__ static int lane() { return thread_index() % kLanes; }
  __device__ __forceinline__ static int row() { return thread_index() / kLanes; }
  __device__ __forceinline__ static const T* first_of(const T* matrix, int leading) {
    return matrix + static_cast<int64_t>(row()) * leading + lane() * 8;
  }

  template <bool kIsWhole>
  __device__ __forceinline__ static void copy(uint32_t tile, const T* from, int64_t pass_step,
                                              int rows, int vectors) {
    if (kVectors < kLanes && lane() >= kVectors) return;
    const uint32_t place = tile + (row() * kStride + lane() * 8) * sizeof(T);
    for_constants<kPasses>([&](auto i) {
      constexpr int kFirst = decltype(i)::value * kRowsOfPass;
      constexpr int kBytes = kFirst * kStride * static_cast<int>(sizeof(T));
      if (kFirst + kRowsOfPass <= kRows || row() + kFirst < kRows) {
        if constexpr (kIsWhole) {
          cp_async_16_at<kBytes>(place, from);
        } else {
          const bool is_there = row() + kFirst < rows && lane() < vectors;
          cp_async_16_at<kBytes>(place, from, is_there ? 16 : 0);
        }
      }
      from += pass_step;
    });
  }
};

template <class C>
using RowsCopy = TileCopy<C, C::kTileRows, kChunk / 8, C::kRowStride>;
template <class C>
using DownCopy = TileCopy<C, C::kRanks, kChunk / 8, C::kRowStride>;
template <class C>
using UpCopy = TileCopy<C, kChunk, C::kRanks / 8, C::kRankStride>;

// The ring of a tile's passes. Each step takes one slot, and its copies are asked for kStages - 1
// steps earlier, across the border between two passes, so that none waits for memory when it starts.
// A thread copies the same places of every chunk: an address is the one before plus a constant.
template <class C>
struct Ring {
  using T = typename C::T;
  static constexpr int kSlotBytes = sizeof(Slot<C>);
  static constexpr int kWeightOffset = offsetof(Slot<C>, weight);
  enum Pass { kLogits, kUp, kDown, kNothing };

  const BackwardParams& p;
  const TileRows& rows;
  const Passes& passes;
  int chunks;
  bool has_residual;
  bool is_whole;  // the tile has all of its rows, and the weights all of its ranks

  int pass = -1;                 // that is asked for
  int left = 0;                  // of its chunks
  const T* from_rows = nullptr;  // this thread's next vectors
  const T* from_weight = nullptr;
  int64_t rows_step = 0, weight_step = 0;            // from chunk to chunk
  int64_t rows_pass_step = 0, weight_pass_step = 0;  // see TileCopy
  uint32_t first, before, read;  // slots: the ring's first, the step's before, the next one

  __device__ __forceinline__ Ring(const BackwardParams& params, BackwardShared<C>& s,
                                  const TileRows& of, const Passes& wanted)
      : p(params), rows(of), passes(wanted) {
    const Call& in = p.in;
    chunks = in.D / kChunk;
    // x reached y as the residual too; another residual gets dy itself, outside of the kernels.
    has_residual = in.residual_from == ResidualFrom::kInput;
    is_whole = rows.count == C::kTileRows && in.R == C::kRanks;
    rows_pass_step = static_cast<int64_t>(RowsCopy<C>::kRowsOfPass) * in.D;
    first = read = before = shared_address(s.slots);
#pragma unroll 1
    for (int step = 0; step < C::kStages - 1; ++step) {
      bring<kLogits>(before);
      cp_async_commit();
      before += kSlotBytes;
    }
  }

  // Finds the next pass that is wanted, which is kFirst or a later one.
  template <Pass kFirst>
  __device__ __forceinline__ void begin_pass() {
    const Call& in = p.in;
    const int64_t start = rows.first * in.D, weights = static_cast<int64_t>(in.R) * in.D;
    ++pass;
    if (pass == kLogits && !passes.logits) ++pass;
    if (pass == kUp && !passes.up) ++pass;
    if (pass == kDown && !passes.down) ++pass;
    left = chunks;
    if (kFirst <= kLogits && pass == kLogits) {
      from_rows = RowsCopy<C>::first_of(in.input_as<T>(kX) + start, in.D);
      rows_step = kChunk;
    } else if (kFirst <= kUp && pass == kUp) {
      from_rows = RowsCopy<C>::first_of(in.doutput_as<T>(kY) + start, in.D);
      rows_step = kChunk;
      const T* weight = static_cast<const T*>(p.w_up) + up_member_of(in, rows) * weights;
      from_weight = UpCopy<C>::first_of(weight, in.R);
      weight_step = static_cast<int64_t>(kChunk) * in.R;
      weight_pass_step = static_cast<int64_t>(UpCopy<C>::kRowsOfPass) * in.R;
    } else if (pass == kDown) {
      // Backwards: what the pass before has read last is then still in the second-level cache.
      const int last = in.D - kChunk;
      from_rows = RowsCopy<C>::first_of(in.doutput_as<T>(kY) + start + last, in.D);
      const T* weight = static_cast<const T*>(p.w_down) + down_member_of(in, rows) * weights;
      from_weight = DownCopy<C>::first_of(weight + last, in.D);
      rows_step = weight_step = -kChunk;
      weight_pass_step = static_cast<int64_t>(DownCopy<C>::kRowsOfPass) * in.D;
    }
  }

  template <Pass kPass, bool kIsWhole>
  __device__ __forceinline__ void copy(uint32_t slot) const {
    if (kPass != kDown || has_residual) {
      RowsCopy<C>::template copy<kIsWhole>(slot, from_rows, rows_pass_step, rows.count, kChunk / 8);
    }
    if constexpr (kPass == kUp) {
      UpCopy<C>::template copy<kIsWhole>(slot + kWeightOffset, from_weight, weight_pass_step,
                                         kChunk, p.in.R / 8);
    } else if constexpr (kPass == kDown) {
      DownCopy<C>::template copy<kIsWhole>(slot + kWeightOffset, from_weight, weight_pass_step,
                                           p.in.R, kChunk / 8);
    }
  }

  template <Pass kPass>
  __device__ __forceinline__ void bring_of(uint32_t slot) {
    if (is_whole) {
      copy<kPass, true>(slot);
    } else {
      copy<kPass, false>(slot);
    }
    from_rows += rows_step;
    if constexpr (kPass != kLogits) from_weight += weight_step;
    --left;
  }

  // Asks for the copies of the next step that has not been asked for, of kFirst or a later pass.
  template <Pass kFirst>
  __device__ __forceinline__ void bring(uint32_t slot) {
    if (left == 0 && pass < kNothing) begin_pass<kFirst>();
    if (kFirst <= kLogits && pass == kLogits) {
      bring_of<kLogits>(slot);
    } else if (kFirst <= kUp && pass == kUp) {
      bring_of<kUp>(slot);
    } else if (kFirst <= kDown && pass == kDown) {
      bring_of<kDown>(slot);
    }
  }

  // The slot of a pass's step `chunk`, after settle(slot), where a thread may change what it has
  // copied itself.
  template <Pass kPass, class Settle>
  __device__ __forceinline__ uint32_t next(int chunk, Settle&& settle) {
    cp_async_wait<C::kStages - 2>();  // this thread's copies of the step have landed
    settle(read);
    sync_threads();  // and everybody's; nobody reads or writes the slot of the step before
    if (chunk < chunks - (C::kStages - 1)) {  // what is asked for belongs to the same pass
      bring_of<kPass>(before);
    } else if constexpr (kPass != kDown) {
      bring<static_cast<Pass>(kPass + 1)>(before);
    }
    cp_async_commit();  // an empty group too: cp_async_wait counts groups
    before = read;
    const uint32_t behind = read + kSlotBytes;
    read = behind == first + C::kStages * kSlotBytes ? first : behind;
    return before;
  }
  template <Pass kPass>
  __device__ __forceinline__ uint32_t next(int chunk) {
    return next<kPass>(chunk, [](uint32_t) {});
  }
};

}  // namespace pelt::gated_adapter
