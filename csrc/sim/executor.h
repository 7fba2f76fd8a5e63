// The executor: runs a CUDA kernel, compiled by the host compiler, on CPU memory.
//
// Each CUDA thread is a fiber. A thread runs until it reaches an instruction at which it must wait
// for others (a barrier, a warp-wide instruction, a flag of another block); then the scheduler
// picks another one, in an order drawn from the seed. What is a silent race or a hang on a GPU is
// an Error here, with the block, the warp, the lanes and the instruction's name.
//
// What this file offers to csrc/sim/*.h, the host bodies of the instructions, is the second half;
// launchers need only run() and LaunchShape, tests also set_seed().
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pelt::sim {

constexpr int kWarpLanes = 32;

// The order of threads, warps and blocks, and the landing of asynchronous copies, follow from the
// seed and nothing else. A kernel without races gives bitwise equal results under every seed.
void set_seed(uint64_t seed);
uint64_t seed();

struct Index3 {
  int x = 0;
  int y = 0;
  int z = 0;
};

struct GridShape {
  Index3 blocks{1, 1, 1};
  int threads = 32;  // per block, a multiple of 32
  size_t shared_bytes = 0;
  // All blocks alive together and scheduled in turn. Otherwise they run one after the other, in an
  // order drawn from the seed, so that a flag awaited across blocks is reported as a deadlock.
  bool is_cooperative = false;
};

// Runs body() once per thread of the grid. Throws Error at the first fault.
void run(const std::string& kernel, const GridShape& shape, const std::function<void()>& body);

// ---- for the instruction bodies; valid only on a thread of a running kernel ----

struct PendingCopy {
  void* shared;
  const void* global;
  int bytes_read;  // the rest of `bytes` is written as zeros
  int bytes;
  int group;
};

struct CopyQueue {
  std::vector<PendingCopy> pending;
  int open_group = 0;  // the group that the next commit closes
};

struct SharedMemory {
  char* base = nullptr;
  size_t bytes = 0;
};

int thread_index();
Index3 block_index();
Index3 grid_blocks();
int block_threads();
SharedMemory shared_memory();
CopyQueue& copy_queue();

// One of `outcomes` equally likely outcomes, from the seed.
uint32_t draw(uint32_t outcomes);

// Lets any other thread run first. Called before each access that other blocks may depend on.
void preempt();

// Waits until is_met() holds; other threads run meanwhile. `what` is the name in a deadlock report.
void wait_for_flag(const char* what, const std::function<bool()>& is_met);

// Arrives at a barrier for `threads` threads, and waits for it unless `waits` is false.
void barrier(const char* instruction, int id, int threads, bool waits);

// A warp-wide instruction: every lane leaves a pointer to its operands; the last one to arrive
// calls execute() on all 32, which writes the results through the same pointers.
using Lanes = void* const*;
void rendezvous(const char* instruction, void* operands, void (*execute)(Lanes lanes));

// Throws Error unless [address, address + bytes) is aligned to `bytes`.
void check_aligned(const char* instruction, const void* address, size_t bytes);

// Throws Error unless [address, address + bytes) lies in the block's shared memory.
void check_in_shared(const char* instruction, const void* address, size_t bytes);

}  // namespace pelt::sim
