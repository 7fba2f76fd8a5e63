// Host bodies of cuda/atomics.cuh. Each access lets other threads run first, so that blocks with a
// common counter are seen in many orders. Fibers of one host thread need no atomic instructions.
#pragma once

#include "sim/executor.h"

namespace pelt {

inline int atomic_add_release(int* counter, int amount) {
  sim::preempt();
  const int before = *counter;
  *counter = before + amount;
  return before;
}

inline int load_acquire(const int* counter) {
  sim::preempt();
  return *counter;
}

inline int take_ticket(int* counter) { return atomic_add_release(counter, 1); }

// Without a change of threads, because a count does not tell in which order it was made.
inline void atomic_count(int* counter, int amount) { *counter += amount; }

inline void wait_until_at_least(const int* counter, int value) {
  sim::wait_for_flag("wait_until_at_least", [=] { return *counter >= value; });
}

}  // namespace pelt
