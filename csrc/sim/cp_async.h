// Host bodies of cuda/cp_async.cuh.
//
// A copy lands as late as a wait allows, so that a missing wait shows: until then the shared memory
// holds what it held. One copy in eight lands at once instead, which shows the opposite fault, a
// buffer that is refilled while others still read it.
#pragma once

#include <cstring>

#include "sim/executor.h"

namespace pelt {
namespace sim_detail {

inline void land(const sim::PendingCopy& copy) {
  // Of an empty tensor the address may be null, which memcpy does not allow even for no bytes.
  if (copy.bytes_read > 0) memcpy(copy.shared, copy.global, copy.bytes_read);
  memset(static_cast<char*>(copy.shared) + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
}

}  // namespace sim_detail

inline void cp_async_16(void* shared, const void* global, bool is_valid) {
  sim::check_in_shared("cp_async_16", shared, 16);
  sim::check_aligned("cp_async_16", shared, 16);
  if (is_valid) sim::check_aligned("cp_async_16", global, 16);
  sim::CopyQueue& queue = sim::copy_queue();
  const sim::PendingCopy copy{shared, global, is_valid ? 16 : 0, 16, queue.open_group};
  if (sim::draw(8) == 0) {
    sim_detail::land(copy);
  } else {
    queue.pending.push_back(copy);
  }
}

inline void cp_async_commit() { ++sim::copy_queue().open_group; }

template <int kGroupsInFlight>
inline void cp_async_wait() {
  sim::CopyQueue& queue = sim::copy_queue();
  const int newest_complete = queue.open_group - 1 - kGroupsInFlight;
  size_t landed = 0;
  while (landed < queue.pending.size() && queue.pending[landed].group <= newest_complete) {
    sim_detail::land(queue.pending[landed++]);
  }
  queue.pending.erase(queue.pending.begin(), queue.pending.begin() + static_cast<long>(landed));
}

}  // namespace pelt
