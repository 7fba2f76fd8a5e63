// One instruction of one group of lanes, and control flow.
#include <cstring>

#include "common/check.h"
#include "sim/machine.h"

namespace pelt::sim {

bool Machine::step(Warp& warp, Group& group) {
  const uint32_t code = static_cast<uint32_t>(group.at);
  check(code < program_.code.size(), "simulator: kernel ", program_.kernel,
        ": ran past its last instruction");
  const Instruction& i = program_.code[code];
  Step step{warp, i, program_.operands_of(i), code, group.lanes, program_.constants.data()};
  if (i.has_guard) {
    const uint32_t holds = *reinterpret_cast<const uint32_t*>(step.at(i.guard));
    step.active &= i.is_guard_negated ? ~holds : holds;
  }
  switch (i.kind) {
    case Kind::kWarpBarrier:
    case Kind::kShuffle:
    case Kind::kVote:
    case Kind::kMma:
    case Kind::kLoadMatrix:
    case Kind::kBarrier:
    case Kind::kBarrierArrive:
      // The lanes that it names have to be together.
      if (step.active != 0 && !gather(step, group)) return false;
      break;
    default:
      break;
  }
  CodeCount& count = count_.code[code];
  ++count.issued;
  count.lanes += static_cast<uint64_t>(__builtin_popcount(step.active));
  if (i.kind == Kind::kBranch) return branch(group, step);
  if (i.kind == Kind::kReturn) return leave(group, step);
  ++group.at;
  if (step.active == 0) return true;
  switch (i.kind) {
    case Kind::kArithmetic: {
      uint8_t* values[8];
      const int operands = i.destinations + i.sources;
      for (int n = 0; n < operands; ++n) values[n] = step.place(n);
      i.execute(values, step.active);
      return true;
    }
    case Kind::kSpecial:
      special(step);
      return true;
    case Kind::kLoad:
      return load(step, group);
    case Kind::kStore:
      store(step);
      return true;
    case Kind::kAtomic:
      atomic(step);
      return true;
    case Kind::kCopyAsync:
      copy_async(step);
      return true;
    case Kind::kCommitCopies:
      for (int lane = 0; lane < kLanes; ++lane) {
        warp.open_group[lane] += static_cast<int>((step.active >> lane) & 1);
      }
      return true;
    case Kind::kWaitForCopies:
      land_copies(step);
      return true;
    case Kind::kLoadMatrix:
      load_matrix(step);
      return true;
    case Kind::kMma:
      mma(step);
      return true;
    case Kind::kShuffle:
      shuffle(step);
      return true;
    case Kind::kVote:
      vote(step);
      return true;
    case Kind::kWarpBarrier:
      if (step.active != kAllLanes) {
        fault(step, -1, "names some lanes only, whose order the simulator does not follow");
      }
      warp.clock.join_lanes();
      return true;
    case Kind::kBarrier:
    case Kind::kBarrierArrive:
      return barrier(step);
    case Kind::kSleep:
      group.asleep_since = warp.looked_at;
      return can_run(group);
    case Kind::kTrap:
      fault(step, -1, "was reached");
    default:
      fault(step, -1, "is not carried out");
  }
}

bool Machine::branch(Group& group, const Step& step) {
  const uint32_t taken = step.active, others = group.lanes & ~step.active;
  if (others == 0) {
    group.at = step.i.target;
  } else if (taken == 0) {
    ++group.at;
  } else {
    const Group jumping{step.i.target, taken, false, 0};
    group.lanes = others;
    ++group.at;
    step.warp.groups.push_back(jumping);  // `group` is not valid from here on
    return false;
  }
  return true;
}

bool Machine::leave(Group& group, const Step& step) {
  Warp& warp = step.warp;
  if (step.active == 0) {
    ++group.at;
    return true;
  }
  for (const PendingCopy& copy : warp.copies) {
    if ((step.active >> copy.lane) & 1) {
      fault(step, static_cast<int>(copy.lane), "while a copy that it started is under way");
    }
  }
  warp.returned |= step.active;
  ++progress_;
  if (step.active != group.lanes) {
    group.lanes &= ~step.active;
    ++group.at;
    return true;
  }
  warp.groups.erase(warp.groups.begin() + (&group - warp.groups.data()));
  if (warp.is_done()) --warp.block.running;
  return false;
}

// Whether the lanes that a warp-wide instruction names have all arrived. Otherwise the group waits,
// and others run until they get there.
bool Machine::gather(const Step& step, Group& group) {
  const Instruction& i = step.i;
  uint32_t named = kAllLanes;
  if (i.kind == Kind::kWarpBarrier || i.kind == Kind::kShuffle || i.kind == Kind::kVote) {
    const uint32_t* lanes = step.lanes32(i.destinations + i.sources - 1);
    const int first = __builtin_ctz(step.active);
    named = lanes[first];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (((step.active >> lane) & 1) && lanes[lane] != named) {
        fault(step, lane, "names other lanes than those that run it with it");
      }
    }
  }
  if (step.active == named) {
    return true;
  }
  if ((step.active & ~named) != 0) {
    fault(step, __builtin_ctz(step.active & ~named), "is run by a lane that it does not name");
  }
  if ((named & step.warp.returned) != 0) {
    fault(
        step, -1,
        sentence("needs lane ", __builtin_ctz(named & step.warp.returned), ", which has returned"));
  }
  if (step.active != group.lanes) {
    fault(step, -1, "is skipped by some of the lanes that it needs");
  }
  group.waits = true;
  return false;
}

bool Machine::barrier(const Step& step) {
  Warp& warp = step.warp;
  const Instruction& i = step.i;
  const uint32_t number = step.lanes32(0)[0];
  if (number >= kBarriers) fault(step, -1, sentence("names barrier ", number, "; there are 16"));
  const int threads = i.sources > 1 ? static_cast<int>(step.lanes32(1)[0]) : request_.threads;
  if (threads <= 0 || threads % kLanes != 0 || threads > request_.threads) {
    fault(step, -1,
          sentence("waits for ", threads, " threads; expected a multiple of 32 up to ",
                   request_.threads));
  }
  Barrier& barrier = warp.block.barriers[number];
  if (barrier.arrived != 0 && barrier.expected != threads) {
    fault(step, -1,
          sentence("waits for ", threads, " threads at barrier ", number,
                   ", at which others wait for ", barrier.expected));
  }
  barrier.expected = threads;
  barrier.arrived += kLanes;
  warp.clock.bring(barrier.knowledge);
  const bool waits = i.kind == Kind::kBarrier;
  if (waits) barrier.waiting.push_back(&warp);
  warp.clock.join_lanes();
  if (barrier.arrived < threads) {
    if (waits) warp.barrier = static_cast<int>(number);
    return !waits;
  }
  for (Warp* waiting : barrier.waiting) {
    waiting->clock.acquire(barrier.knowledge);
    waiting->barrier = -1;
  }
  barrier = Barrier(warp.block.first_warp);
  ++progress_;
  yields_ = true;  // what comes behind a barrier must not depend on who reached it last
  return true;
}

void Machine::special(const Step& step) {
  const Block& block = step.warp.block;
  auto* to = reinterpret_cast<uint32_t*>(step.place(0));
  const auto value = [&](int lane) -> int {
    switch (static_cast<Special>(step.i.variant)) {
      case Special::kThread:
        return step.warp.index * kLanes + lane;
      case Special::kLane:
        return lane;
      case Special::kThreads:
        return request_.threads;
      case Special::kBlockX:
        return block.index.x;
      case Special::kBlockY:
        return block.index.y;
      case Special::kBlockZ:
        return block.index.z;
      case Special::kBlocksX:
        return request_.blocks.x;
      case Special::kBlocksY:
        return request_.blocks.y;
      case Special::kBlocksZ:
        return request_.blocks.z;
      case Special::kOne:
        return 1;
      default:
        return 0;
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((step.active >> lane) & 1) to[lane] = static_cast<uint32_t>(value(lane));
  }
}

}  // namespace pelt::sim
