#include "sim/memory.h"

#include <algorithm>

#include "common/check.h"

namespace pelt::sim {
namespace {

// Whether an earlier access and this one may stand side by side without an order.
bool is_ordered(Stamp earlier, const Access& access, const CodeFacts& facts) {
  const uint32_t lane = earlier.lane();
  if (lane == Stamp::kEarlier) return true;
  if (lane == Stamp::kUnderWay) return false;
  if (access.clock->is_after(earlier, access.lane)) return true;
  return access.is_strong && facts.is_strong(earlier.code());
}

Finding race(const char* what, Stamp earlier) {
  if (earlier.lane() == Stamp::kUnderWay) {
    return {std::string("touches what an asynchronous copy, for which its thread has not waited, "
                        "is writing"),
            earlier};
  }
  return {std::string("race: ") + what, earlier};
}

}  // namespace

void Shadow::start(uint64_t address, size_t bytes, bool is_written) {
  begin_ = address / 16 * 16;
  shift_ = 2;
  cells_.assign((address + bytes - begin_ + 3) / 4, Cell{});
  if (is_written) mark_written(address, bytes);
}

void Shadow::mark_written(uint64_t address, size_t bytes) {
  if (bytes == 0) return;
  refine(address, bytes);
  for (size_t i = index_of(address); i <= index_of(address + bytes - 1); ++i) {
    cells_[i] = {Stamp::earlier(), {}, {}};
  }
}

void Shadow::forget_accesses() {
  for (Cell& cell : cells_) {
    cell = {cell.write.bits != 0 ? Stamp::earlier() : Stamp{}, {}, {}};
  }
}

void Shadow::refine(uint64_t address, size_t bytes) {
  while (((address | bytes) & ((uint64_t{1} << shift_) - 1)) != 0) {
    std::vector<Cell> finer;
    finer.reserve(2 * cells_.size());
    for (const Cell& cell : cells_) finer.insert(finer.end(), 2, cell);
    cells_ = std::move(finer);
    --shift_;
  }
}

// Of one warp's reads those that its last barrier orders are forgotten, and the others stand as one,
// of the last one's time and, where they are of several lanes, of many.
void Shadow::note_read(Cell& cell, const Access& access) {
  Stamp stamp = access.stamp;
  if (cell.read.bits == stamp.bits) return;
  if (cell.read.warp() != stamp.warp()) {
    std::swap(cell.read, cell.other_read);  // now what was read last is the other one
  }
  const Stamp before = cell.read;
  if (before.bits != 0 && before.warp() == stamp.warp() && before.lane() != stamp.lane() &&
      before.epoch() >= access.clock->joined) {
    stamp.bits = stamp.bits >> Stamp::kLaneBits << Stamp::kLaneBits | Stamp::kManyLanes;
  }
  cell.read = stamp;
}

bool Shadow::read(uint64_t address, size_t bytes, const Access& access, const CodeFacts& facts,
                  Finding* finding) {
  refine(address, bytes);
  Stamp seen = Stamp::earlier();  // neighbours were mostly written by one access
  for (size_t i = index_of(address); i <= index_of(address + bytes - 1); ++i) {
    Cell& cell = cells_[i];
    const Stamp last = cell.write;
    if (last.bits != seen.bits) {
      if (last.bits == 0) {
        *finding = {"reads memory that nobody has written", {}};
        return false;
      }
      if (!is_ordered(last, access, facts)) {
        *finding = race("reads what another thread writes, with nothing that orders the two", last);
        return false;
      }
      if (access.is_read_only) {
        *finding = {"reads by the read-only path what this kernel writes", last};
        return false;
      }
      seen = last;
    }
    note_read(cell, access);
  }
  return true;
}

bool Shadow::write(uint64_t address, size_t bytes, const Access& access, const CodeFacts& facts,
                   Finding* finding) {
  refine(address, bytes);
  for (size_t i = index_of(address); i <= index_of(address + bytes - 1); ++i) {
    Cell& cell = cells_[i];
    if (cell.write.bits != 0 && !is_ordered(cell.write, access, facts)) {
      *finding =
          race("writes what another thread writes, with nothing that orders the two", cell.write);
      return false;
    }
    for (Stamp read : {cell.read, cell.other_read}) {
      if (read.bits == 0) continue;
      if (facts.is_read_only(read.code())) {
        *finding = {"writes what this kernel reads by the read-only path", read};
        return false;
      }
      if (!is_ordered(read, access, facts)) {
        *finding = race("writes what another thread reads, with nothing that orders the two", read);
        return false;
      }
    }
    cell = {access.stamp, {}, {}};
  }
  return true;
}

void Shadow::set_writer(uint64_t address, size_t bytes, Stamp stamp) {
  for (size_t i = index_of(address); i <= index_of(address + bytes - 1); ++i) {
    cells_[i].write = stamp;
  }
}

void GlobalMemory::give(uint64_t address, size_t bytes, bool is_written) {
  if (bytes == 0) return;
  Range added{address, address + bytes, {}};
  std::vector<Range> kept;
  bool was_written = false;
  for (Range& range : ranges_) {
    if (range.end <= added.begin || added.end <= range.begin) {
      kept.push_back(std::move(range));
    } else {
      added.begin = std::min(added.begin, range.begin);
      added.end = std::max(added.end, range.end);
      was_written = true;
    }
  }
  // Ranges overlap where tensors are views of one storage; what is given again is written.
  added.shadow.start(added.begin, added.end - added.begin, is_written || was_written);
  kept.push_back(std::move(added));
  std::sort(kept.begin(), kept.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  ranges_ = std::move(kept);
  last_ = 0;
}

void GlobalMemory::mark_written(uint64_t address, size_t bytes) {
  Range* range = find(address, bytes);
  if (range != nullptr) range->shadow.mark_written(address, bytes);
}

void GlobalMemory::start_launch() {
  for (Range& range : ranges_) range.shadow.forget_accesses();
}

Range* GlobalMemory::find(uint64_t address, size_t bytes) {
  const auto holds = [&](const Range& range) {
    return address >= range.begin && address + bytes <= range.end;
  };
  if (last_ < ranges_.size() && holds(ranges_[last_])) return &ranges_[last_];
  const auto after =
      std::upper_bound(ranges_.begin(), ranges_.end(), address,
                       [](uint64_t value, const Range& range) { return value < range.begin; });
  if (after == ranges_.begin() || !holds(*(after - 1))) return nullptr;
  last_ = static_cast<size_t>(after - 1 - ranges_.begin());
  return &ranges_[last_];
}

std::string GlobalMemory::describe(uint64_t address) const {
  const Range* below = nullptr;
  for (const Range& range : ranges_) {
    if (range.begin <= address) below = &range;
  }
  if (below == nullptr) return "before all memory that was given to the kernel";
  if (address < below->end) return "across the end of a tensor";
  return sentence(address - below->end, " bytes behind the end of a tensor of ",
                  below->end - below->begin, " bytes");
}

GlobalMemory& global_memory() {
  // Each thread of the host launches and waits for itself.
  static thread_local GlobalMemory memory;
  return memory;
}

}  // namespace pelt::sim
