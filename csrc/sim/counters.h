// What launches did, instruction by instruction, and the memory traffic that it makes.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/launch_request.h"

namespace pelt::sim {

struct Program;

// Of one instruction of a program.
struct CodeCount {
  uint64_t issued = 0;      // warp instructions
  uint64_t lanes = 0;       // that took part
  uint64_t bytes = 0;       // that lanes asked for; of an asynchronous copy, of global memory
  uint64_t sectors = 0;     // of 32 bytes of global memory, distinct ones of each warp instruction
  uint64_t wavefronts = 0;  // passes through shared memory; more than the least are bank conflicts
  uint64_t least_wavefronts = 0;
};

// Sectors of 32 bytes that a level of memory has to move at least: of the second-level cache those
// that each block touches, of memory those that any block touches.
struct Traffic {
  uint64_t cache_read = 0, cache_written = 0;
  uint64_t memory_read = 0, memory_written = 0;
};

struct LaunchCount {
  const Program* program = nullptr;
  Dim3 blocks;
  int threads = 0;
  size_t shared_bytes = 0;
  int blocks_per_multiprocessor = 1;
  std::vector<CodeCount> code;
  Traffic traffic;
};

// Follows the global memory of one launch.
class TrafficMeter {
 public:
  // One access of a warp; returns its sectors.
  uint64_t touch(const uint64_t (&addresses)[32], uint32_t lanes, bool is_write, uint32_t block,
                 Traffic* traffic);

 private:
  struct Mark {
    uint32_t reader = 0, writer = 0;  // the last block that touched the sector, counted from 1
  };
  std::unordered_map<uint64_t, Mark> marks_;  // by sector
};

// Adds the passes that the 32 banks of 4 bytes need for one access of a warp to shared memory: lanes
// go together as far as they fill 128 bytes, and distinct words of one bank one after the other.
void add_wavefronts(const uint64_t (&addresses)[32], uint32_t lanes, size_t bytes,
                    CodeCount* count);

// From here on the thread's launches are counted, with traffic; without_checks lets them run
// several times faster, for large shapes. Ends with the counts. Meanwhile everything runs in one
// order, whatever the seed, so that equal launches count equally, and the device has as many
// multiprocessors as it really has.
void start_counting(bool without_checks);
std::vector<LaunchCount> stop_counting();
bool is_counting();
bool has_checks();
// Where a launch counts: kept if the thread's launches are counted.
LaunchCount& count_of_launch(const Program& program, const LaunchRequest& request);

}  // namespace pelt::sim
