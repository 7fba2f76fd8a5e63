// A thread's share of the chunks that pass through shared memory, for operands that lie whole at
// 16-byte borders. It copies the same places of every chunk, so its addresses are made once and move
// on by constants; other operands are staged element by element (cuda/rows.cuh).
#pragma once

#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {

// Chunks [kNarrowRows, kChunk] of x or dy. Rows past the end repeat the last one instead of being
// zeros: nothing that is made of them is stored. Past the last column there are zeros.
template <class T>
struct RowCopies {
  static constexpr int kStep = kThreads / kVectors, kTurns = kNarrowRows / kStep;
  static constexpr int kStepBytes = kStep * kChunkStride * sizeof(T);

  const T* from[kTurns];  // what the next chunk needs
  int left;               // columns, from the thread's own on
  uint32_t to;            // of the first vector, in the ring's first stage

  // `first`: the tile's element (0, 0), whose rows are `leading` elements apart.
  __device__ __forceinline__ RowCopies(const void* first, int64_t leading, int rows, int columns,
                                       uint32_t tile) {
    const int row = thread_index() / kVectors, column = thread_index() % kVectors * 8;
    left = columns - column;
    to = kept_address(tile + sizeof(T) * (row * kChunkStride + column));
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int there = row + turn * kStep < rows ? row + turn * kStep : rows - 1;
      // A thread whose first vector lies past the last column reads nothing, anywhere.
      from[turn] = static_cast<const T*>(first) + there * leading + (left > 0 ? column : 0);
    }
  }

  // Asks for the next chunk. `stage`: where, in bytes from the ring's first.
  __device__ __forceinline__ void bring(uint32_t stage) {
    const int bytes = left > 0 ? 16 : 0;
    left -= kChunk;
    for_constants<kTurns>([&](auto turn) {
      constexpr int i = decltype(turn)::value;
      cp_async_16_at<i * kStepBytes>(to + stage, from[i], bytes);
      from[i] += kChunk;
    });
  }
};

// Chunks of a factor: kTurns vectors of a thread, which lie kTurnBytes from each other in shared
// memory and kTurnLeft from each other in the dimension along which the chunks follow. Those of
// float32 factors pass through registers, between fetch() and put().
template <class T, int kTurns, int kTurnBytes, int kTurnLeft>
struct FactorCopies {
  const char* from[kTurns];  // what the next chunk needs
  int step[kTurns];          // bytes from chunk to chunk; 0: there is nothing, zeros
  bool is_float32[kTurns];
  int left = 0;  // of the dimension, from the first vector on
  uint32_t to = 0;
  Float8 held[kTurns];

  // Vector i is eight elements of `source` from element `at` on, and in the next chunk `stride`
  // elements further; `any` is an address of global memory, for what is not there.
  __device__ __forceinline__ void set(int i, const Parameter& source, int64_t at, int stride,
                                      const void* any) {
    const bool is_there = source.data != nullptr;
    is_float32[i] = is_there && source.is_float32;
    const int size = is_float32[i] ? sizeof(float) : sizeof(T);
    from[i] = is_there ? static_cast<const char*>(source.data) + at * size
                       : static_cast<const char*>(any);
    step[i] = is_there ? stride * size : 0;
  }

  __device__ __forceinline__ void fetch(uint32_t stage) {
    for_constants<kTurns>([&](auto turn) {
      constexpr int i = decltype(turn)::value;
      const bool is_there = step[i] != 0 && left > i * kTurnLeft;
      if (!is_float32[i]) {
        cp_async_16_at<i * kTurnBytes>(to + stage, from[i], is_there ? 16 : 0);
      } else {
        held[i] = is_there ? load_8(reinterpret_cast<const float*>(from[i])) : Float8{};
      }
      from[i] += step[i];
    });
    left -= kChunk;
  }

  __device__ __forceinline__ void put(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (is_float32[i]) store_shared_16(to + stage + i * kTurnBytes, narrow<T>(held[i]));
    }
  }
};

}  // namespace pelt::lora_linear
