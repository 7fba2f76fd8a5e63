#include "sim/machine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <numeric>

#include "common/check.h"

namespace pelt::sim {
namespace {

std::atomic<uint64_t> g_seed{1};

std::string describe_lanes(uint32_t lanes) {
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!((lanes >> lane) & 1)) continue;
    int last = lane;
    while (last + 1 < kLanes && ((lanes >> (last + 1)) & 1)) ++last;
    text += sentence(text.empty() ? "" : ", ", lane);
    if (last > lane) text += sentence("-", last);
    lane = last;
  }
  return text;
}

// Programs are parsed once in a process.
const Program& program_of(const LaunchRequest& request) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::unique_ptr<Program>> programs;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string key = sentence(static_cast<const void*>(request.ptx.data()), request.entry);
  std::unique_ptr<Program>& program = programs[key];
  if (!program) program = std::make_unique<Program>(parse(request.ptx, request.entry));
  return *program;
}

}  // namespace

Warp::Warp(Block& of_block, int number, uint32_t id_in_launch, uint32_t first_warp,
           size_t register_bytes)
    : block(of_block),
      index(number),
      id(id_in_launch),
      clock(id_in_launch, first_warp),
      groups{{0, kAllLanes, false}},
      storage(register_bytes / 64 + 1) {
  // A value that no lane computed is no number and no address.
  memset(registers(), 0xff, storage.size() * 64);
}

Machine::Machine(const Program& program, const LaunchRequest& request, uint64_t seed)
    : program_(program),
      request_(request),
      random_(is_counting() ? 0 : seed),
      furthest_first_(!is_counting() && random_.below(4) == 0),
      order_(static_cast<size_t>(request.blocks.x) * request.blocks.y * request.blocks.z),
      warps_per_block_(static_cast<uint32_t>(request.threads / kLanes)),
      count_(count_of_launch(program, request)),
      is_counting_(is_counting()),
      has_checks_(has_checks()) {
  std::iota(order_.begin(), order_.end(), 0);
  random_.shuffle(order_);
  check(order_.size() * warps_per_block_ < (size_t{1} << Stamp::kWarpBits) &&
            program.code.size() < (size_t{1} << Stamp::kCodeBits),
        "simulator: kernel ", program.kernel,
        ": expected at most 2^20 warps and 2^18 instructions, "
        "got ",
        order_.size() * warps_per_block_, " and ", program.code.size());
}

void Machine::run() {
  // One block after the other where traffic is counted, so that each block's is its own.
  const size_t at_once = request_.is_cooperative ? order_.size() : is_counting_ ? 1 : kBlocksAtOnce;
  while (next_block_ < order_.size() || !alive_.empty()) {
    while (alive_.size() < at_once && next_block_ < order_.size()) {
      start_block(order_[next_block_++]);
    }
    if (!run_some_warp()) fail(describe_deadlock());
  }
}

void Machine::start_block(int linear) {
  alive_.push_back(std::make_unique<Block>());
  Block& block = *alive_.back();
  block.index = {linear % request_.blocks.x, linear / request_.blocks.x % request_.blocks.y,
                 linear / request_.blocks.x / request_.blocks.y};
  block.first_warp = static_cast<uint32_t>(linear) * warps_per_block_;
  const size_t bytes = program_.static_shared_bytes + request_.shared_bytes;
  // Any number may stand in memory that nobody has written: sometimes a NaN, sometimes 0.
  const bool is_zero = random_.below(4) == 0;
  block.shared.assign(bytes, is_zero ? 0 : 0xff);
  block.shadow.start(0, bytes, false);
  block.barriers.assign(kBarriers, Barrier(block.first_warp));
  for (uint32_t w = 0; w < warps_per_block_; ++w) {
    block.warps.push_back(std::make_unique<Warp>(block, static_cast<int>(w), block.first_warp + w,
                                                 block.first_warp, program_.register_bytes));
  }
  block.running = static_cast<int>(warps_per_block_);
}

// Runs a warp that can, for a random while; false if none can.
bool Machine::run_some_warp() {
  const size_t first_block = random_.below(static_cast<uint32_t>(alive_.size()));
  for (size_t b = 0; b < alive_.size(); ++b) {
    const size_t position = (first_block + b) % alive_.size();
    Block& block = *alive_[position];
    const size_t first_warp = random_.below(warps_per_block_);
    for (size_t w = 0; w < warps_per_block_; ++w) {
      Warp& warp = *block.warps[(first_warp + w) % warps_per_block_];
      if (!can_run(warp)) continue;
      // Mostly as far as barriers let it, which is what makes a missing barrier show.
      run_warp(warp, random_.below(4) == 0 ? 1 + static_cast<int>(random_.below(64)) : 1 << 20);
      if (block.running == 0) alive_.erase(alive_.begin() + static_cast<long>(position));
      return true;
    }
  }
  return false;
}

void Machine::run_warp(Warp& warp, int budget) {
  Group* group = choose_group(warp);
  yields_ = false;
  for (; budget > 0 && group != nullptr && !yields_; --budget) {
    const bool goes_on = step(warp, *group);
    if (goes_on && warp.groups.size() == 1) continue;
    merge_groups(warp);
    group = can_run(warp) ? choose_group(warp) : nullptr;
  }
}

bool Machine::can_run(const Warp& warp) const {
  if (warp.is_done() || warp.barrier >= 0) return false;
  bool all_wait = true;
  for (const Group& group : warp.groups) {
    if (can_run(group)) return true;
    all_wait = all_wait && group.waits;
  }
  return all_wait;  // for each other: choose_group() tells
}

Group* Machine::choose_group(Warp& warp) {
  Group* chosen = nullptr;
  for (Group& group : warp.groups) {
    if (!can_run(group)) continue;
    if (chosen == nullptr || (group.at < chosen->at) != furthest_first_) chosen = &group;
  }
  if (chosen != nullptr) return chosen;
  std::string text = sentence("simulator: kernel ", program_.kernel, ", ", describe(warp),
                              ": lanes wait for each other at different instructions");
  for (const Group& group : warp.groups) {
    text += sentence("; lanes ", describe_lanes(group.lanes), " at ", where(group.at));
  }
  if (warp.returned != 0) text += sentence("; lanes ", describe_lanes(warp.returned), " returned");
  fail(text);
}

// Groups at one instruction become one.
void Machine::merge_groups(Warp& warp) {
  for (size_t i = 0; i < warp.groups.size(); ++i) {
    for (size_t j = warp.groups.size() - 1; j > i; --j) {
      if (warp.groups[i].at != warp.groups[j].at) continue;
      warp.groups[i] = {warp.groups[i].at, warp.groups[i].lanes | warp.groups[j].lanes, false, 0};
      warp.groups.erase(warp.groups.begin() + static_cast<long>(j));
    }
  }
}

std::string Machine::describe(const Warp& warp) {
  const Dim3& block = warp.block.index;
  return sentence("block ", block.x, ",", block.y, ",", block.z, ", warp ", warp.index);
}

std::string Machine::describe_deadlock() const {
  std::string text = sentence("simulator: kernel ", program_.kernel, ": deadlock");
  int reports = 0;
  bool waits_for_flags = false;
  for (const auto& block : alive_) {
    for (const auto& warp : block->warps) {
      waits_for_flags = waits_for_flags || (!warp->is_done() && warp->barrier < 0);
      if (reports == 8) continue;
      text += sentence("; ", describe(*warp), ": ");
      if (warp->is_done()) {
        text += "returned";
      } else if (warp->barrier >= 0) {
        const Barrier& barrier = block->barriers[static_cast<size_t>(warp->barrier)];
        text += sentence("waits at barrier ", warp->barrier, " (", barrier.arrived, " of ",
                         barrier.expected, " threads) at ", where(warp->groups[0].at - 1));
      } else {
        text += sentence("waits for a flag at ", where(warp->groups[0].at));
      }
      ++reports;
    }
  }
  if (waits_for_flags && !request_.is_cooperative) {
    text += "; the launch is not cooperative, so a block must not wait for another one's flag";
  }
  return text;
}

std::string Machine::where(uint32_t code) const {
  if (code >= program_.code.size()) return "the end";
  const Instruction& i = program_.code[code];
  return sentence(program_.names[i.name], " (", program_.describe_source(i.source), ", PTX line ",
                  i.line, ")");
}

void Machine::fault(const Step& step, int lane, const Finding& finding) const {
  std::string text = sentence("simulator: kernel ", program_.kernel, ", ", describe(step.warp));
  if (lane >= 0) text += sentence(", lane ", lane);
  text += sentence(": ", where(step.code), " ", finding.text);
  if (finding.other.bits != 0) {
    const uint32_t warp = finding.other.warp(), other_lane = finding.other.lane();
    text += sentence("; the other is ", where(finding.other.code()), " of block ",
                     warp / warps_per_block_, ", warp ", warp % warps_per_block_);
    if (other_lane < kLanes) text += sentence(", lane ", other_lane);
  }
  fail(text);
}

void Machine::fault(const Step& step, int lane, const std::string& text) const {
  fault(step, lane, Finding{text, {}});
}

void set_seed(uint64_t seed) { g_seed = seed; }

void give_memory(const void* address, size_t bytes, bool is_written) {
  global_memory().give(reinterpret_cast<uint64_t>(address), bytes, is_written);
}
void mark_written(const void* address, size_t bytes) {
  global_memory().mark_written(reinterpret_cast<uint64_t>(address), bytes);
}
void take_back_memory() { global_memory().take_back(); }

void run(const LaunchRequest& request) {
#if defined(__x86_64__)
  check(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
        "simulator: expected a processor with AVX2 and FMA, for which it is compiled");
#endif
  const Program& program = program_of(request);
  check(request.threads > 0 && request.threads % kLanes == 0, "simulator: kernel ", program.kernel,
        ": expected a multiple of 32 threads, got ", request.threads);
  global_memory().start_launch();
  Machine(program, request, g_seed.load()).run();
}

}  // namespace pelt::sim
