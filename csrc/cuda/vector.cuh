// Eight neighbouring elements of a row in float32. A tile is loaded and stored in such pieces: they
// are 16 bytes of a 2-byte dtype, the widest access of a thread.
#pragma once

#include "common/dtype.h"
#include "cuda/memory.cuh"
#include "cuda/words.h"

namespace pelt {

struct Float8 {
  float v[8];
};

// Eight 2-byte elements as floats; exact.
template <class T>
__device__ __forceinline__ Float8 widen(const Words4& words) {
  Float8 out;
  for (int i = 0; i < 4; ++i) {
    const Float2 pair = unpack<T>(words.word[i]);
    out.v[2 * i] = pair.low;
    out.v[2 * i + 1] = pair.high;
  }
  return out;
}

// Eight floats as 2-byte elements, each rounded to the nearest.
template <class T>
__device__ __forceinline__ Words4 narrow(const Float8& values) {
  Words4 out;
  for (int i = 0; i < 4; ++i) out.word[i] = pack<T>(values.v[2 * i], values.v[2 * i + 1]);
  return out;
}

// Reads eight elements of a 16-byte aligned global row. For inputs only: see load_global_16.
template <class T>
__device__ __forceinline__ Float8 load_8(const T* address) {
  if constexpr (sizeof(T) == 4) {
    Float8 out;
    for (int half = 0; half < 2; ++half) {
      const Words4 words = load_global_16(address + 4 * half);
      for (int i = 0; i < 4; ++i) out.v[4 * half + i] = float_from_bits(words.word[i]);
    }
    return out;
  } else {
    return widen<T>(load_global_16(address));
  }
}

}  // namespace pelt
