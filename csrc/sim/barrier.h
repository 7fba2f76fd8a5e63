// Host bodies of cuda/barrier.cuh. They order nothing in memory, which one host thread reads and
// writes; they change which thread runs. Without a needed barrier a warp runs ahead and reads what
// is not written yet, so that results differ from seed to seed.
#pragma once

#include "sim/executor.h"

namespace pelt {

inline void sync_threads() { sim::barrier("sync_threads", 0, sim::block_threads(), true); }

inline void sync_warp() {
  sim::rendezvous("sync_warp", nullptr, [](sim::Lanes) {});
}

template <int kBarrier>
inline void named_barrier_sync(int threads) {
  static_assert(kBarrier >= 1 && kBarrier <= 15, "barrier 0 belongs to sync_threads");
  sim::barrier("named_barrier_sync", kBarrier, threads, true);
}

template <int kBarrier>
inline void named_barrier_arrive(int threads) {
  static_assert(kBarrier >= 1 && kBarrier <= 15, "barrier 0 belongs to sync_threads");
  sim::barrier("named_barrier_arrive", kBarrier, threads, false);
}

}  // namespace pelt
