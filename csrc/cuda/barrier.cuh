// Barriers inside a block. Every thread must reach them: none may have returned.
//
// A barrier orders accesses to shared memory: what a thread wrote before it, every thread may read
// behind it. A kernel needs one between writing a tile and reading it, and another one between
// reading it and writing the next tile to the same place; a comment at each says which of the two.
#pragma once

namespace pelt {

// All threads of the block.
__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// All 32 lanes of a warp. Enough where no other warp touches the memory in question.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Waits for `threads` threads (a multiple of 32) at one of the barriers 1 to 15.
template <int kBarrier>
__device__ __forceinline__ void named_barrier_sync(int threads) {
  static_assert(kBarrier >= 1 && kBarrier <= 15, "barrier 0 belongs to sync_threads");
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// Counts as arrived without waiting: for the side of a hand-over that has written, and goes on.
template <int kBarrier>
__device__ __forceinline__ void named_barrier_arrive(int threads) {
  static_assert(kBarrier >= 1 && kBarrier <= 15, "barrier 0 belongs to sync_threads");
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

}  // namespace pelt
