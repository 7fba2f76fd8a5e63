// Dynamic shared memory, 4-byte and 16-byte accesses. Addresses are aligned to the access, which
// the simulator checks.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/words.h"

namespace pelt {

// The block's dynamic shared memory as a struct of named tiles. Nothing in it is initialised.
template <class Shared>
__device__ __forceinline__ Shared& shared_memory_as() {
  static_assert(alignof(Shared) <= 1024, "shared memory is aligned to 1024 bytes");
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Shared*>(dynamic_shared_memory);
}

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// Reads a pair of 2-byte elements.
__device__ __forceinline__ uint32_t load_4(const void* address) {
  return *static_cast<const uint32_t*>(address);
}

__device__ __forceinline__ void store_4(void* address, uint32_t value) {
  *static_cast<uint32_t*>(address) = value;
}

// Reads eight 2-byte elements or four floats.
__device__ __forceinline__ Words4 load_16(const void* address) {
  return *static_cast<const Words4*>(address);
}

// The same for inputs that no thread of the grid writes: they may go through the read-only path.
__device__ __forceinline__ Words4 load_global_16(const void* address) {
  Words4 value;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(address));
  return value;
}

__device__ __forceinline__ void store_16(void* address, const Words4& value) {
  *static_cast<Words4*>(address) = value;
}

// The same to a 32-bit address of shared memory.
__device__ __forceinline__ void store_shared_16(uint32_t address, const Words4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

// Accesses to a 32-bit address of shared memory and a constant number of bytes behind it.
template <int kBytes>
__device__ __forceinline__ void store_shared_4_at(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0 + %1], %2;" ::"r"(address), "n"(kBytes), "r"(value) : "memory");
}

template <int kBytes>
__device__ __forceinline__ Words4 load_shared_16_at(uint32_t address) {
  Words4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "r"(address), "n"(kBytes)
               : "memory");
  return value;
}

template <int kBytes>
__device__ __forceinline__ Float2 load_shared_pair_at(uint32_t address) {
  Float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];"
               : "=f"(value.low), "=f"(value.high)
               : "r"(address), "n"(kBytes)
               : "memory");
  return value;
}

// Writes what nobody reads soon: it is the first to leave the caches, so that it displaces nothing
// that is read again.
__device__ __forceinline__ void store_global_16_streaming(void* address, const Words4& value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

}  // namespace pelt
