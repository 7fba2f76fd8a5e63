// Counters between blocks. Only integers: a sum of floats in order of arrival would differ from run
// to run, so partial sums go to memory and are added in a fixed order by whoever comes last.
//
// The pattern on both sides: sync_threads(), then one thread touches the counter, then for a reader
// sync_threads() again. The first barrier protects the block's writes, which have to come before
// the release; the second one its reads, which have to come after the acquire. One thread's acquire
// or release suffices, because a barrier orders the other threads' accesses with it.
#pragma once

namespace pelt {

// Returns the value before. What this thread (and, after a barrier, its block) wrote is visible to
// whoever acquires the new value.
__device__ __forceinline__ int atomic_add_release(int* counter, int amount) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(amount)
               : "memory");
  return before;
}

__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Returns how many blocks took a ticket before, for "the last block to arrive does the rest": it
// releases what the block wrote, and acquires what the blocks with smaller tickets wrote.
__device__ __forceinline__ int take_ticket(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// Adds to a counter in global or in shared memory: the order of additions to an integer does not
// matter. It orders no access to other memory.
__device__ __forceinline__ void atomic_count(int* counter, int amount) {
  atomicAdd(counter, amount);
}

// Spins until another block has counted up to the value. That block must be resident, so the launch
// must be cooperative; otherwise it might start only when this one ends.
__device__ __forceinline__ void wait_until_at_least(const int* counter, int value) {
  while (load_acquire(counter) < value) __nanosleep(64);
}

}  // namespace pelt
