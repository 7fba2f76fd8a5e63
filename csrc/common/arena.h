// Consecutive arrays in one piece of memory. Without memory an arena counts, so that one function
// tells both how large a workspace is and where its arrays lie.
//
// It comes from outside to the CPU kernels, so it has a name; `take` is always inlined, so that no
// linker finds one that was compiled for another instruction set (see cpu/isa.h).
#pragma once

#include <cstdint>

namespace pelt {

struct Arena {
  char* base = nullptr;      // at a multiple of 64 bytes
  bool only_counts = false;  // its size is asked for, and nothing is to be computed
  int64_t used = 0;          // bytes

  // Floats where no type is named. Each array starts in a cache line of its own, which also is a
  // place for the widest vectors.
  template <class T = float>
  [[gnu::always_inline]] T* take(int64_t count) {
    constexpr int64_t kAlignment = 64;
    T* array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
};

}  // namespace pelt
