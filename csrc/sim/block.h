// The state of a simulated block: its threads, warps, barriers and shared memory, and how it is
// told in a report.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "sim/executor.h"
#include "sim/fiber.h"
#include "sim/memory_pool.h"

namespace pelt::sim {

constexpr int kNamedBarriers = 16;

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  char* stack = nullptr;
  int index = 0;
  const char* waits_at = nullptr;  // the instruction, while it is not ready
  CopyQueue copies;
};

struct Warp {
  uint32_t ready = 0;     // lanes that can run
  uint32_t finished = 0;  // lanes whose kernel function has returned
  uint32_t arrived = 0;   // lanes at the warp-wide instruction
  const char* instruction = nullptr;
  void* operands[kWarpLanes] = {};
};

struct Barrier {
  int arrived = 0;   // since the barrier last opened, threads that do not wait included
  int expected = 0;  // threads at which it opens, as the first one to arrive said
  std::vector<Thread*> waiting;
};

struct Block {
  Block(size_t shared_bytes, int thread_count)
      : arena(shared_bytes), threads(thread_count), warps(thread_count / kWarpLanes) {}

  Index3 index;
  Arena arena;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> order;  // of the warps: the first one with a ready lane runs
  Barrier barriers[kNamedBarriers];
  int unfinished = 0;
};

inline std::string describe(Index3 index) {
  return sentence("(", index.x, ", ", index.y, ", ", index.z, ")");
}

inline std::string describe_lanes(uint32_t lanes) {
  std::string text;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes >> lane & 1u) text += (text.empty() ? "" : ", ") + std::to_string(lane);
  }
  return text;
}

// What the unfinished lanes of a warp wait at, and which have returned; empty if all have.
inline std::string describe_stuck_warp(const Block& block, int w) {
  const Warp& warp = block.warps[w];
  if (warp.finished == ~uint32_t{0}) return "";
  std::string text;
  if (warp.arrived != 0) {
    text = sentence(__builtin_popcount(warp.arrived), " of 32 lanes wait at ", warp.instruction);
  }
  uint32_t reported = warp.arrived | warp.finished;
  while (reported != ~uint32_t{0}) {
    const int first = __builtin_ctz(~reported);
    const char* at = block.threads[w * kWarpLanes + first].waits_at;
    uint32_t group = 0;
    for (int lane = first; lane < kWarpLanes; ++lane) {
      if (block.threads[w * kWarpLanes + lane].waits_at == at) group |= uint32_t{1} << lane;
    }
    group &= ~reported;
    text += sentence(text.empty() ? "" : ", ", __builtin_popcount(group), " of 32 lanes wait at ",
                     at == nullptr ? "nothing" : at);
    reported |= group;
  }
  if (warp.finished != 0) {
    text += sentence(", ", __builtin_popcount(warp.finished), " returned (lanes ",
                     describe_lanes(warp.finished), ")");
  }
  return text;
}

}  // namespace pelt::sim
