// Starting a kernel: the only place that does. It opts in to large shared memory, takes the caller's
// stream and checks the error. The simulator's module links a CUDA runtime of its own (csrc/sim), so
// that the same text runs there.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/type_list.h"

namespace pelt {

using Stream = void*;  // a cudaStream_t

struct LaunchShape {
  int blocks_x = 1;
  int blocks_y = 1;
  int blocks_z = 1;
  int threads = 32;
  size_t shared_bytes = 0;
  bool is_cooperative = false;  // all blocks resident: they may wait for each other's flags
};

// Whether this thread only finds out what launches need, and launches nothing (see Rehearsal).
inline thread_local bool t_is_rehearsal = false;

// While there is one, what launches on this thread: each kernel is loaded, and what a launch would be
// refused for is thrown as an Error. So a backend says before anything runs which calls it cannot
// serve on this GPU, from the same code that launches.
struct Rehearsal {
  Rehearsal() { t_is_rehearsal = true; }
  ~Rehearsal() { t_is_rehearsal = false; }
};

// Throws Error where a block takes more shared memory than the device has. More than 48 KB have to
// be asked for, once per kernel and device; the answer is kept, because asking costs about as much
// host time as the launch.
template <auto kKernel>
void opt_in_shared(const char* name, size_t bytes) {
  static std::atomic<size_t> granted[kMaxDevices];
  std::atomic<size_t>& here = granted[current_device()];
  if (here.load(std::memory_order_relaxed) >= bytes) return;
  check(bytes <= max_shared_bytes(), "a block of ", name, " takes ", bytes,
        " bytes of shared memory, and ", device().name, " has ", max_shared_bytes());
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      name, ": asking for ", bytes, " bytes of shared memory");
  here.store(bytes, std::memory_order_relaxed);
}

// Of the configurations that serve a call, runs the first whose shared memory this GPU has; where it
// has that of none, the one that takes least, whose launch then tells how much is missing. False if
// none serves the call.
template <template <class> class Shared, class... Types, class Fits, class Run>
bool run_first_fit_here(TypeList<Types...> configs, Fits&& fits, Run&& run) {
  size_t most = 0;
  const auto note = [&](auto tag) {
    const size_t bytes = sizeof(Shared<typename decltype(tag)::type>);
    if (fits(tag) && (most == 0 || bytes < most)) most = bytes;
  };
  (note(TypeTag<Types>{}), ...);
  most = std::max(most, max_shared_bytes());
  return run_first_fit(
      configs,
      [&](auto tag) { return fits(tag) && sizeof(Shared<typename decltype(tag)::type>) <= most; },
      run);
}

// How many blocks of this kernel the whole device holds at once. The last answer is kept for each
// device; a kernel's blocks as a rule have one size.
template <auto kKernel>
int resident_blocks(const char* name, int threads, size_t shared_bytes) {
  static std::atomic<uint64_t> kept[kMaxDevices];
  constexpr int kBits = 8;  // of the answer for a multiprocessor, behind what was asked
  const uint64_t asked = (static_cast<uint64_t>(threads) << 32 | shared_bytes) << kBits;
  std::atomic<uint64_t>& here = kept[current_device()];
  uint64_t answer = here.load(std::memory_order_relaxed);
  if (answer >> kBits != asked >> kBits) {
    opt_in_shared<kKernel>(name, shared_bytes);
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                   &blocks, reinterpret_cast<const void*>(kKernel), threads, shared_bytes),
               name, ": cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    answer = asked | static_cast<uint64_t>(blocks);
    here.store(answer, std::memory_order_relaxed);
  }
  return static_cast<int>(answer & ((1 << kBits) - 1)) * multiprocessors();
}

inline void zero_async(void* memory, size_t bytes, Stream stream) {
  if (t_is_rehearsal) return;
  check_cuda(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)),
             "cudaMemsetAsync");
}

template <auto kKernel>
void rehearse(const char* name, const LaunchShape& shape) {
  constexpr int kMostYz = 65535;
  check(shape.blocks_y <= kMostYz && shape.blocks_z <= kMostYz, name, " would take ",
        shape.blocks_x, " x ", shape.blocks_y, " x ", shape.blocks_z,
        " blocks, and the second and third number are at most ", kMostYz);
  check_cuda(load_kernel(reinterpret_cast<const void*>(kKernel)), name, ": loading it");
  opt_in_shared<kKernel>(name, shape.shared_bytes);
}

// The launch is by cudaLaunchKernelExC, which unlike <<< >>> can be cooperative.
template <auto kKernel, class Params>
void launch(const char* name, const LaunchShape& shape, Stream stream, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
  static_assert(sizeof(Params) <= 4096, "kernel parameters are limited to 4096 bytes");
  if (t_is_rehearsal) return rehearse<kKernel>(name, shape);
  if (shape.shared_bytes > 48 * 1024) opt_in_shared<kKernel>(name, shape.shared_bytes);
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y, shape.blocks_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = shape.is_cooperative ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kKernel), arguments), name,
             ": launching ", shape.blocks_x, " x ", shape.blocks_y, " x ", shape.blocks_z,
             " blocks of ", shape.threads, " threads with ", shape.shared_bytes,
             " bytes of shared memory");
}

}  // namespace pelt
