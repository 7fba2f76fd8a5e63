#include "sim/limits.h"

#include <algorithm>

#include "common/check.h"
#include "sim/counters.h"
#include "sim/device.h"

namespace pelt::sim {
namespace {

template <class... Parts>
Refusal refuse(cudaError_t status, const Parts&... parts) {
  return {status, sentence(parts...)};
}

Refusal check_grid(const std::string& kernel, const Dim3& blocks) {
  constexpr int kMostX = 0x7fffffff, kMostYz = 65535;
  if (blocks.x < 1 || blocks.y < 1 || blocks.y > kMostYz || blocks.z < 1 || blocks.z > kMostYz) {
    return refuse(cudaErrorInvalidConfiguration, "kernel ", kernel, ": expected 1 to ", kMostX,
                  " x ", kMostYz, " x ", kMostYz, " blocks, got ", blocks.x, " x ", blocks.y, " x ",
                  blocks.z);
  }
  return {};
}

Refusal check_resident(const std::string& kernel, const KernelHeader& header,
                       const LaunchRequest& request) {
  const Dim3& blocks = request.blocks;
  const int64_t resident = int64_t{multiprocessors()} *
                           blocks_per_multiprocessor(header, request.threads, request.shared_bytes);
  const int64_t count = int64_t{blocks.x} * blocks.y * blocks.z;
  if (count > resident) {
    return refuse(cudaErrorCooperativeLaunchTooLarge, "kernel ", kernel, ": expected at most ",
                  resident, " blocks in a cooperative launch, the most that are resident at once, ",
                  "got ", count);
  }
  return {};
}

Refusal check_parameters(const std::string& kernel, const KernelHeader& header) {
  constexpr size_t kMostBytes = 4096;
  const size_t count = header.parameters.size();
  if (count != 1 || header.parameter_bytes > kMostBytes) {
    return refuse(cudaErrorInvalidValue, "kernel ", kernel, ": expected one parameter of at most ",
                  kMostBytes, " bytes, and it has ", count, " of ", header.parameter_bytes,
                  " bytes");
  }
  return {};
}

}  // namespace

int multiprocessors() { return is_counting() ? device().multiprocessors : kMultiprocessors; }

int blocks_per_multiprocessor(const KernelHeader& header, int threads, size_t shared_bytes) {
  if (!is_counting()) return kBlocksPerMultiprocessor;
  constexpr size_t kReserved = 1024;  // of shared memory, for each block
  const Device& device = sim::device();
  const auto by_shared =
      static_cast<int>(device.shared_bytes_per_multiprocessor / (shared_bytes + kReserved));
  const int blocks = std::min(
      {by_shared, device.threads_per_multiprocessor / threads, device.blocks_per_multiprocessor});
  const int promised = header.blocks_per_multiprocessor;
  return promised > 0 ? std::min(blocks, promised) : blocks;
}

Refusal check_image(const KernelHeader& header, const std::string& kernel) {
  const Device& device = sim::device();
  if (header.capability > device.capability) {
    return refuse(cudaErrorNoKernelImageForDevice, "kernel ", kernel, " is made for sm_",
                  header.capability, ", and ", device.name, " is sm_", device.capability);
  }
  if (!device.has_image) {
    return refuse(cudaErrorNoKernelImageForDevice, "kernel ", kernel, " is not made for ",
                  device.name);
  }
  return {};
}

Refusal check_block(const KernelHeader& header, const std::string& kernel, int64_t threads,
                    size_t shared_bytes, size_t granted) {
  const Refusal refusal = check_image(header, kernel);
  if (refusal.status != cudaSuccess) return refusal;
  const Device& device = sim::device();
  if (threads < 1 || threads > 1024) {
    return refuse(cudaErrorInvalidConfiguration, "kernel ", kernel,
                  ": expected 1 to 1024 threads in a block, got ", threads);
  }
  if (threads > header.most_threads) {
    return refuse(cudaErrorInvalidValue, "kernel ", kernel, ": expected at most ",
                  header.most_threads, " threads in a block, which its bounds promise, got ",
                  threads);
  }
  if (shared_bytes > device.shared_bytes_per_block) {
    return refuse(cudaErrorInvalidValue, "kernel ", kernel, ": expected at most ",
                  device.shared_bytes_per_block, " bytes of shared memory in a block of ",
                  device.name, ", got ", shared_bytes);
  }
  if (shared_bytes > granted) {
    return refuse(cudaErrorInvalidValue, "kernel ", kernel, ": expected at most ", granted,
                  " bytes of shared memory, which ",
                  granted == kSharedBytesUnasked ? "is all that comes without asking"
                                                 : "were asked for by cudaFuncSetAttribute",
                  ", got ", shared_bytes);
  }
  return {};
}

Refusal check_launch(const KernelHeader& header, const LaunchRequest& request, size_t granted) {
  const std::string kernel = short_name(request.entry);
  Refusal refusal = check_grid(kernel, request.blocks);
  if (refusal.status == cudaSuccess) {
    refusal = check_block(header, kernel, request.threads, request.shared_bytes, granted);
  }
  if (refusal.status == cudaSuccess) refusal = check_parameters(kernel, header);
  if (refusal.status == cudaSuccess && request.is_cooperative) {
    refusal = check_resident(kernel, header, request);
  }
  return refusal;
}

}  // namespace pelt::sim
