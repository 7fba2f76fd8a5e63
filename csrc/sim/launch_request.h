// What the simulator's CUDA runtime (runtime.cpp) asks of its executor: to run one kernel of a
// module's PTX on memory that was given to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pelt::sim {

struct Dim3 {
  int x = 1;
  int y = 1;
  int z = 1;
};

struct LaunchRequest {
  std::string_view ptx;  // the text of the module that holds the kernel; it stays where it is
  std::string entry;     // the kernel's name in it
  Dim3 blocks;
  int threads = 32;  // per block
  size_t shared_bytes = 0;
  int blocks_per_multiprocessor = 1;  // at once, where launches are counted
  bool is_cooperative = false;        // all blocks resident: they may wait for each other's flags
  const void* params = nullptr;       // as many bytes as the kernel declares
};

// Throws Error with the fault's whole text.
void run(const LaunchRequest& request);

// Memory that kernels may touch; everything else is a fault, and so is reading what nobody wrote.
void give_memory(const void* address, size_t bytes, bool is_written);
void mark_written(const void* address, size_t bytes);
void take_back_memory();  // all of it

// The order of threads, warps and blocks, and the landing of asynchronous copies, follow from the
// seed and nothing else. A kernel without races gives bitwise equal results under every seed.
void set_seed(uint64_t seed);

}  // namespace pelt::sim
