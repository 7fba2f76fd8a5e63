// Starting a kernel: the only place that does. It opts in to large shared memory, takes the caller's
// stream and checks the error. The simulator's module links a CUDA runtime of its own (csrc/sim), so
// that the same text runs there.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <type_traits>

#include "common/check.h"

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

inline void check_cuda(cudaError_t status, const std::string& what) {
  check(status == cudaSuccess, what, ": ", cudaGetErrorName(status), " (", static_cast<int>(status),
        "): ", cudaGetErrorString(status));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline size_t max_shared_bytes() {
  int bytes = 0;
  check_cuda(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()),
      "cudaDevAttrMaxSharedMemoryPerBlockOptin");
  return static_cast<size_t>(bytes);
}

// More than 48 KB of shared memory has to be asked for, once per kernel and device; the answer is
// kept, because asking costs about as much host time as the launch.
template <auto kKernel>
void opt_in_shared(const std::string& name, size_t bytes) {
  constexpr int kMaxDevices = 64;
  static std::atomic<size_t> granted[kMaxDevices];
  const int device = current_device();
  check(device < kMaxDevices, name, ": expected a device below ", kMaxDevices, ", got ", device);
  if (granted[device].load(std::memory_order_relaxed) >= bytes) return;
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      sentence(name, ": asking for ", bytes, " bytes of shared memory"));
  granted[device].store(bytes, std::memory_order_relaxed);
}

inline int multiprocessors() {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
             "cudaDevAttrMultiProcessorCount");
  return count;
}

// How many blocks of this kernel the whole device holds at once.
template <auto kKernel>
int resident_blocks(int threads, size_t shared_bytes) {
  opt_in_shared<kKernel>("resident_blocks", shared_bytes);
  int per_multiprocessor = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_multiprocessor, reinterpret_cast<const void*>(kKernel), threads, shared_bytes),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return per_multiprocessor * multiprocessors();
}

inline void zero_async(void* memory, size_t bytes, Stream stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)),
             "cudaMemsetAsync");
}

// The launch is by cudaLaunchKernelExC, which unlike <<< >>> can be cooperative.
template <auto kKernel, class Params>
void launch(const std::string& name, const LaunchShape& shape, Stream stream,
            const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
  static_assert(sizeof(Params) <= 4096, "kernel parameters are limited to 4096 bytes");
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
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kKernel), arguments),
             sentence(name, ": launching ", shape.blocks_x, " x ", shape.blocks_y, " x ",
                      shape.blocks_z, " blocks of ", shape.threads, " threads with ",
                      shape.shared_bytes, " bytes of shared memory"));
}

}  // namespace pelt
