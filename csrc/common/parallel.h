// Work on several CPU threads, by OpenMP: the pool is the one that torch uses, and the caller says
// how many of its threads to take.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pelt {
namespace {

// body(i, thread) for each i in [0, count), on any of `threads` threads: what the bodies write must
// not depend on which; the number is for scratch memory. Chunks are handed out one by one, so that
// a thread that was interrupted holds nobody up.
template <class Body>
void parallel_for_on(int64_t count, int threads, Body&& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    // Entering a parallel region, even of one thread, would cost more than a small body.
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
#else
  for (int64_t i = 0; i < count; ++i) body(i, 0);
#endif
}

// body(i) for each i in [0, count).
template <class Body>
void parallel_for(int64_t count, int threads, Body&& body) {
  parallel_for_on(count, threads, [&](int64_t i, int) { body(i); });
}

}  // namespace
}  // namespace pelt
