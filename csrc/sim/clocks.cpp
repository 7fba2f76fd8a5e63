#include "sim/clocks.h"

#include <algorithm>

namespace pelt::sim {

void Known::join(const Known& other) {
  before = std::max(before, other.before);
  if (other.lanes_before == lanes_before) {
    lanes |= other.lanes;
  } else if (other.lanes_before > lanes_before) {
    lanes = other.lanes;
    lanes_before = other.lanes_before;
  }
}

void Knowledge::join(const Knowledge& other) {
  for (uint32_t i = 0; i < kBlockWarps; ++i) {
    if (other.block_[i].before != 0 || other.block_[i].lanes_before != 0) {
      of(other.first_ + i).join(other.block_[i]);
    }
  }
  for (const auto& [warp, known] : other.others_) of(warp).join(known);
}

void Clock::join_lanes() {
  joined = ++epoch;
  if (acquirers_ == 0) return;
  knowledge_.join(*acquired_);
  acquired_.reset();
  acquirers_ = 0;
}

void Clock::release(uint32_t lane, Knowledge& counter) const {
  counter.join(knowledge_);
  if (has_acquired(lane)) counter.join(*acquired_);
  counter.of(warp_).join({joined, uint32_t{1} << lane, epoch + 1});
}

void Clock::acquire(uint32_t lane, const Knowledge& counter) {
  if (!acquired_) acquired_.emplace(first_);
  acquired_->join(counter);
  acquirers_ |= uint32_t{1} << lane;
}

void Clock::bring(Knowledge& barrier) const {
  barrier.join(knowledge_);
  if (acquired_) barrier.join(*acquired_);
  barrier.of(warp_).join({epoch + 1, 0, 0});
}

}  // namespace pelt::sim
