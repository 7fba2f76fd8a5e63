// Host bodies of cuda/memory.cuh. They check the alignment that the GPU's instructions need, and
// copy bytes, because the elements are of another type than the access.
#pragma once

#include <cstring>

#include "cuda/words.h"
#include "sim/executor.h"

namespace pelt {

template <class Shared>
inline Shared& shared_memory_as() {
  static_assert(alignof(Shared) <= 1024, "shared memory is aligned to 1024 bytes");
  sim::check_in_shared("shared_memory_as", sim::shared_memory().base, sizeof(Shared));
  return *reinterpret_cast<Shared*>(sim::shared_memory().base);
}

inline uint32_t load_4(const void* address) {
  sim::check_aligned("load_4", address, 4);
  uint32_t value;
  memcpy(&value, address, sizeof(value));
  return value;
}

inline void store_4(void* address, uint32_t value) {
  sim::check_aligned("store_4", address, 4);
  memcpy(address, &value, sizeof(value));
}

inline Words4 load_16(const void* address) {
  sim::check_aligned("load_16", address, 16);
  Words4 value;
  memcpy(&value, address, sizeof(value));
  return value;
}

inline Words4 load_global_16(const void* address) {
  sim::check_aligned("load_global_16", address, 16);
  Words4 value;
  memcpy(&value, address, sizeof(value));
  return value;
}

inline void store_16(void* address, const Words4& value) {
  sim::check_aligned("store_16", address, 16);
  memcpy(address, &value, sizeof(value));
}

}  // namespace pelt
