// Asynchronous copies from global to shared memory (sm_80): issue, commit a group, wait for groups.
// A wait covers the copies of the calling thread only. So each wait is followed by a barrier,
// behind which every thread has waited and the whole tile may be read.
#pragma once

#include "cuda/memory.cuh"

namespace pelt {

// Copies 16 bytes, or writes 16 zero bytes without touching `global` where it is not valid. The
// copy bypasses L1, because a block reads its tiles once.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(is_valid ? 16 : 0)
               : "memory");
}

// The same to a 32-bit address of shared memory and a constant number of bytes behind it. `bytes` is
// 16, or 0 for zeros.
template <int kBytes>
__device__ __forceinline__ void cp_async_16_at(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %1], [%2], 16, %3;" ::"r"(shared), "n"(kBytes),
               "l"(global), "r"(bytes)
               : "memory");
}

// The same where all of it is valid: one instruction of the machine. A validity that is known only at
// run time costs one more as a bool, and four as a number of bytes.
template <int kBytes>
__device__ __forceinline__ void cp_async_16_at(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0 + %1], [%2], 16;" ::"r"(shared), "n"(kBytes),
               "l"(global)
               : "memory");
}

// Closes the group of copies that the thread has started since the last commit; it may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kGroupsInFlight of the newest committed groups are still under way.
template <int kGroupsInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

}  // namespace pelt
