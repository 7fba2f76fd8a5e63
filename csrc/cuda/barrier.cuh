// Barriers inside a block. Every thread must reach them: none may have returned.
#pragma once

namespace pelt {

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// All 32 lanes; orders their accesses to shared memory.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Waits for `threads` threads (a multiple of 32) at one of the barriers 1 to 15.
template <int kBarrier>
__device__ __forceinline__ void named_barrier_sync(int threads) {
  static_assert(kBarrier >= 1 && kBarrier <= 15, "barrier 0 belongs to sync_threads");
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// Counts as arrived without waiting: the producer's side of a hand-over.
template <int kBarrier>
__device__ __forceinline__ void named_barrier_arrive(int threads) {
  static_assert(kBarrier >= 1 && kBarrier <= 15, "barrier 0 belongs to sync_threads");
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

}  // namespace pelt
