// Loads, stores, atomics and asynchronous copies, with the checks of every access.
#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "sim/machine.h"

namespace pelt::sim {
namespace {

// The lanes of a mask, lowest first.
template <class Visit>
void for_lanes(uint32_t lanes, Visit&& visit) {
  for (; lanes != 0; lanes &= lanes - 1) visit(__builtin_ctz(lanes));
}

uint64_t extend(uint64_t value, int bytes, bool is_signed) {
  if (!is_signed || bytes == 8) return value;
  const int shift = 64 - 8 * bytes;
  return static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
}

uint32_t combine(Atomic what, uint32_t old, uint32_t a, uint32_t b, bool is_signed) {
  const bool is_less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(old) : a < old;
  switch (what) {
    case Atomic::kAdd:
      return old + a;
    case Atomic::kMin:
      return is_less ? a : old;
    case Atomic::kMax:
      return is_less ? old : a;
    case Atomic::kAnd:
      return old & a;
    case Atomic::kOr:
      return old | a;
    case Atomic::kExchange:
      return a;
    default:
      return old == a ? b : old;
  }
}

}  // namespace

uint64_t Machine::Step::address(int source, int which, int lane) const {
  const uint8_t* values = place(i.destinations + source);
  const uint64_t base = i.is_wide[which] ? reinterpret_cast<const uint64_t*>(values)[lane]
                                         : reinterpret_cast<const uint32_t*>(values)[lane];
  return base + static_cast<uint64_t>(i.offset[which]);
}

Access Machine::access(const Step& step, int lane) const {
  const Warp& warp = step.warp;
  const auto l = static_cast<uint32_t>(lane);
  return {Stamp::of(warp.id, l, warp.clock.epoch, step.code), l, &warp.clock, step.i.is_strong,
          step.i.is_read_only};
}

bool Machine::touch(Shadow& shadow, const Step& step, Use use, uint64_t address, size_t bytes,
                    int lane, Finding* finding) {
  const Access by = access(step, lane);
  if (use == Use::kWrite) return shadow.write(address, bytes, by, *this, finding);
  if (step.i.used_bytes == ~uint32_t{0}) {
    if (!shadow.read(address, bytes, by, *this, finding)) return false;
  } else {
    for (size_t n = 0; n < bytes; n += step.i.element_bytes) {
      if (!((step.i.used_bytes >> n) & 1)) continue;
      if (!shadow.read(address + n, step.i.element_bytes, by, *this, finding)) return false;
    }
  }
  return use == Use::kRead || shadow.write(address, bytes, by, *this, finding);
}

uint8_t* Machine::reach(const Step& step, Use use, Space space, uint64_t address, size_t bytes,
                        int lane) {
  if (address % bytes != 0) {
    fault(step, lane,
          sentence("is misaligned: expected an address that is a multiple of ", bytes, ", got ",
                   reinterpret_cast<const void*>(address), ", which is ", address % bytes,
                   " too high"));
  }
  const bool is_window = space == Space::kGeneric || space == Space::kParam;
  if (space == Space::kShared || (is_window && address >= kSharedWindow)) {
    return reach_shared(step, use, address & ~kSharedWindow, bytes, lane);
  }
  if (space == Space::kParam || (is_window && address >= kParamWindow)) {
    const uint64_t offset = address & ~kParamWindow;
    if (use != Use::kRead || offset + bytes > program_.param_bytes) {
      fault(step, lane,
            sentence("is not a read inside the ", program_.param_bytes,
                     " bytes of parameters: offset ", offset));
    }
    return static_cast<uint8_t*>(const_cast<void*>(request_.params)) + offset;
  }
  return reach_global(step, use, address, bytes, lane);
}

uint8_t* Machine::reach_shared(const Step& step, Use use, uint64_t address, size_t bytes,
                               int lane) {
  Block& block = step.warp.block;
  if (address + bytes > block.shared.size()) {
    fault(step, lane,
          sentence("is outside the block's shared memory of ", block.shared.size(),
                   " bytes: ", bytes, " bytes at ", address));
  }
  if (!has_checks_) return block.shared.data() + address;
  Finding finding;
  if (!touch(block.shadow, step, use, address, bytes, lane, &finding)) {
    finding.text += sentence("; shared address ", address);
    fault(step, lane, finding);
  }
  return block.shared.data() + address;
}

uint8_t* Machine::reach_global(const Step& step, Use use, uint64_t address, size_t bytes,
                               int lane) {
  Range* range = global_memory().find(address, bytes);
  if (range == nullptr) {
    fault(
        step, lane,
        sentence("touches memory that the kernel was not given: ", bytes, " bytes at ",
                 reinterpret_cast<const void*>(address), ", ", global_memory().describe(address)));
  }
  if (!has_checks_) return reinterpret_cast<uint8_t*>(address);
  Finding finding;
  if (!touch(range->shadow, step, use, address, bytes, lane, &finding)) {
    finding.text +=
        sentence("; byte ", address - range->begin, " of a tensor of ", range->end - range->begin);
    fault(step, lane, finding);
  }
  return reinterpret_cast<uint8_t*>(address);
}

void Machine::count_access(const Step& step, Space space, const uint64_t (&addresses)[kLanes],
                           size_t bytes, bool is_write) {
  if (space == Space::kParam) return;
  CodeCount& count = count_.code[step.code];
  count.bytes += bytes * static_cast<uint64_t>(__builtin_popcount(step.active));
  if (is_shared(space, addresses[__builtin_ctz(step.active)])) {
    add_wavefronts(addresses, step.active, bytes, &count);
  } else {
    count.sectors += meter_.touch(addresses, step.active, is_write,
                                  step.warp.block.first_warp / warps_per_block_, &count_.traffic);
  }
}

bool Machine::load(const Step& step, Group& group) {
  const Instruction& i = step.i;
  const size_t element = i.element_bytes, bytes = element * i.vector;
  uint8_t* to[4];
  for (int n = 0; n < i.vector; ++n) to[n] = step.place(n);
  uint64_t addresses[kLanes];
  for_lanes(step.active, [&](int lane) {
    const uint64_t address = addresses[lane] = step.address(0, 0, lane);
    const uint8_t* from = reach(step, Use::kRead, i.space, address, bytes, lane);
    for (int n = 0; n < i.vector; ++n) {
      uint64_t value = 0;
      memcpy(&value, from + static_cast<size_t>(n) * element, element);
      value = extend(value, static_cast<int>(element), i.is_signed);
      if (i.is_wide[1]) {
        reinterpret_cast<uint64_t*>(to[n])[lane] = value;
      } else {
        reinterpret_cast<uint32_t*>(to[n])[lane] = static_cast<uint32_t>(value);
      }
    }
    if (i.acquires) {
      const auto counter = counters_.find(address);
      if (counter != counters_.end()) {
        step.warp.clock.acquire(static_cast<uint32_t>(lane), counter->second);
      }
    }
  });
  if (is_counting_) count_access(step, i.space, addresses, bytes, false);
  if (!i.is_strong) return true;
  // A lane that looks at a flag in vain, again and again, sleeps until something has happened. How
  // often it looks is no count of the kernel's, so the first look is the last one there.
  const int patience = is_counting_ ? 1 : 1 << 12;
  Warp& warp = step.warp;
  warp.looks = warp.looked_at == progress_ ? warp.looks + 1 : 0;
  warp.looked_at = progress_;
  if (warp.looks >= patience) group.asleep_since = progress_;
  return can_run(group);
}

void Machine::store(const Step& step) {
  const Instruction& i = step.i;
  const size_t element = i.element_bytes, bytes = element * i.vector;
  const size_t lane_bytes = i.is_wide[1] ? 8 : 4;
  uint64_t addresses[kLanes];
  for_lanes(step.active, [&](int lane) {
    const uint64_t address = addresses[lane] = step.address(0, 0, lane);
    uint8_t* to = reach(step, Use::kWrite, i.space, address, bytes, lane);
    for (int n = 0; n < i.vector; ++n) {
      memcpy(to + static_cast<size_t>(n) * element,
             step.place(1 + n) + static_cast<size_t>(lane) * lane_bytes, element);
    }
    if (i.releases) {
      const auto counter =
          counters_.try_emplace(address, Knowledge(step.warp.block.first_warp)).first;
      step.warp.clock.release(static_cast<uint32_t>(lane), counter->second);
    }
  });
  if (i.releases) step.warp.clock.tick();
  if (is_counting_) count_access(step, i.space, addresses, bytes, true);
  if (i.space != Space::kShared) ++progress_;
}

void Machine::atomic(const Step& step) {
  const Instruction& i = step.i;
  uint64_t addresses[kLanes];
  for_lanes(step.active, [&](int lane) {
    const uint64_t address = addresses[lane] = step.address(0, 0, lane);
    uint8_t* at = reach(step, Use::kAtomic, i.space, address, 4, lane);
    uint32_t old;
    memcpy(&old, at, 4);
    const int first = i.destinations + 1;
    const uint32_t a = step.lanes32(first)[lane];
    const uint32_t b = i.sources > 2 ? step.lanes32(first + 1)[lane] : 0;
    const uint32_t now = combine(static_cast<Atomic>(i.variant), old, a, b, i.is_signed);
    memcpy(at, &now, 4);
    if (i.destinations > 0) reinterpret_cast<uint32_t*>(step.place(0))[lane] = old;
    if (!i.acquires && !i.releases) return;
    Knowledge& counter =
        counters_.try_emplace(address, Knowledge(step.warp.block.first_warp)).first->second;
    if (i.acquires) step.warp.clock.acquire(static_cast<uint32_t>(lane), counter);
    if (i.releases) step.warp.clock.release(static_cast<uint32_t>(lane), counter);
  });
  if (i.releases) step.warp.clock.tick();
  if (is_counting_) count_access(step, i.space, addresses, 4, true);
  ++progress_;
}

// The copy is under way from here to the wait of its own thread: until then nobody may touch its
// place, and nobody may have been reading it. Most copies land as late as the wait, some at once;
// the checks do not depend on it, but wrong numbers of an unchecked kind would.
void Machine::copy_async(const Step& step) {
  const Instruction& i = step.i;
  const uint32_t bytes = i.element_bytes;
  uint64_t places[kLanes], sources[kLanes];
  Step reading = step;  // by the lanes that copy at all
  reading.active = 0;
  for_lanes(step.active, [&](int lane) {
    const uint64_t to = places[lane] = step.address(0, 0, lane);
    const uint64_t from = sources[lane] = step.address(1, 1, lane);
    const uint32_t read = step.lanes32(2)[lane];
    if (read > 0) reading.active |= uint32_t{1} << lane;
    if (read > bytes) fault(step, lane, sentence("reads ", read, " bytes of ", bytes));
    if (from % bytes != 0) {
      fault(
          step, lane,
          sentence("is misaligned: expected a source that is a multiple of ", bytes, ", got ",
                   reinterpret_cast<const void*>(from), ", which is ", from % bytes, " too high"));
    }
    PendingCopy copy{static_cast<uint32_t>(lane),
                     static_cast<uint32_t>(to & ~kSharedWindow),
                     bytes,
                     step.warp.open_group[lane],
                     access(step, lane).stamp,
                     {}};
    reach(step, Use::kWrite, Space::kShared, to, bytes, lane);
    if (read > 0) memcpy(copy.data, reach_global(step, Use::kRead, from, read, lane), read);
    if (random_.below(8) == 0) {
      memcpy(step.warp.block.shared.data() + copy.to, copy.data, bytes);
    }
    if (has_checks_) {
      step.warp.block.shadow.set_writer(copy.to, bytes, Stamp::under_way(copy.stamp));
    }
    step.warp.copies.push_back(copy);
  });
  if (!is_counting_) return;
  add_wavefronts(places, step.active, bytes, &count_.code[step.code]);
  if (reading.active != 0) count_access(reading, Space::kGlobal, sources, bytes, false);
}

void Machine::land_copies(const Step& step) {
  Warp& warp = step.warp;
  const auto in_flight = static_cast<int>(step.i.offset[0]);  // groups that need not have landed
  auto& copies = warp.copies;
  size_t kept = 0;
  for (const PendingCopy& copy : copies) {
    const bool is_waited_for =
        ((step.active >> copy.lane) & 1) && copy.group < warp.open_group[copy.lane] - in_flight;
    if (!is_waited_for) {
      copies[kept++] = copy;
      continue;
    }
    memcpy(warp.block.shared.data() + copy.to, copy.data, copy.bytes);
    if (!has_checks_) continue;
    // Now it is a write of its thread, at this time.
    warp.block.shadow.set_writer(
        copy.to, copy.bytes, Stamp::of(warp.id, copy.lane, warp.clock.epoch, copy.stamp.code()));
  }
  copies.resize(kept);
}

}  // namespace pelt::sim
