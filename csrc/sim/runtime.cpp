// The part of the CUDA runtime's interface that objects compiled by nvcc and launchers refer to, for
// a GPU made of software. A launch is checked as a driver checks it, and then run to its end.
//
// Everything here is hidden in the module, so that a process may hold NVIDIA's runtime beside it.
#include <cuda_runtime_api.h>

#include <array>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "common/check.h"
#include "sim/device.h"
#include "sim/kernels.h"
#include "sim/launch_request.h"
#include "sim/limits.h"
#include "sim/module.h"

namespace pelt::sim {
namespace {

struct Kernel {
  const Module* module;
  std::string entry;
  std::optional<KernelHeader> header;             // read at the first launch
  std::array<size_t, kMostDevices> shared_bytes;  // that were asked for, on each device
  std::string_view replacement;                   // of the module's text, if not empty

  const KernelHeader& read() {
    if (!header) header = read_header(module->ptx, entry);
    return *header;
  }
  std::string name() const { return short_name(entry); }
  std::string_view text() const { return replacement.empty() ? module->ptx : replacement; }
};

// What registered itself when the program was loaded. It is never taken down, because what unloads
// it runs at an unknown moment of the end.
struct Registry {
  std::mutex mutex;
  std::deque<Module> modules;
  std::unordered_map<const void*, Kernel> kernels;  // by their host functions
};

Registry& registry() {
  static auto* registry = new Registry;
  return *registry;
}

// The last one of this thread, whose text its status alone does not tell.
thread_local Refusal t_fault;

cudaError_t refuse(Refusal refusal) {
  if (refusal.status != cudaSuccess) t_fault = std::move(refusal);
  return refusal.status;
}

template <class... Parts>
cudaError_t refuse(cudaError_t status, const Parts&... parts) {
  return refuse(Refusal{status, sentence(parts...)});
}

// Runs what may throw, and makes a status of it.
template <class Run>
cudaError_t caught(cudaError_t status, Run&& run) {
  try {
    return run();
  } catch (const std::exception& error) {
    return refuse(status, error.what());
  }
}

// What calls meet first. A driver serves all versions with its major number.
cudaError_t check_driver() {
  const int driver = device().driver;
  if (driver / 1000 >= CUDART_VERSION / 1000) return cudaSuccess;
  return refuse(cudaErrorInsufficientDriver, "expected a driver for CUDA ", CUDART_VERSION / 1000,
                ", got one for CUDA ", driver / 1000);
}

// Calls use(kernel) for the kernel of a host function.
template <class Use>
cudaError_t with_kernel(const void* function, Use&& use) {
  const cudaError_t status = check_driver();
  if (status != cudaSuccess) return status;
  std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().kernels.find(function);
  if (found == registry().kernels.end()) {
    return refuse(cudaErrorInvalidDeviceFunction, "expected the host function of a kernel, got ",
                  function);
  }
  Kernel& kernel = found->second;
  const std::string& fault = kernel.module->fault;
  if (!fault.empty()) {
    return refuse(cudaErrorInvalidKernelImage, "kernel ", kernel.name(), ": ", fault);
  }
  return caught(cudaErrorInvalidPtx, [&] { return use(kernel); });
}

// Whether the launch is cooperative; nothing else may be asked of it.
cudaError_t read_attributes(const cudaLaunchConfig_t& config, bool* is_cooperative) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeCooperative) {
      return refuse(cudaErrorNotSupported, "launch attribute ", config.attrs[i].id,
                    ": the simulator knows the one of cooperative launches only");
    }
    *is_cooperative = config.attrs[i].val.cooperative != 0;
  }
  return cudaSuccess;
}

// Fills the request unless the launch is refused.
cudaError_t prepare(Kernel& kernel, const cudaLaunchConfig_t& config, void** arguments,
                    LaunchRequest* request) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (block.y != 1 || block.z != 1) {
    return refuse(cudaErrorNotSupported, "kernel ", kernel.name(),
                  ": expected blocks of one dimension, got ", block.x, " x ", block.y, " x ",
                  block.z, " threads");
  }
  cudaError_t status = read_attributes(config, &request->is_cooperative);
  if (status != cudaSuccess) return status;
  request->ptx = kernel.text();
  request->entry = kernel.entry;
  request->blocks = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
  request->threads = static_cast<int>(block.x);
  request->shared_bytes = config.dynamicSmemBytes;
  request->params = arguments[0];
  status = refuse(check_launch(kernel.read(), *request, kernel.shared_bytes[current_device()]));
  if (status == cudaSuccess) {
    request->blocks_per_multiprocessor =
        blocks_per_multiprocessor(kernel.read(), request->threads, request->shared_bytes);
  }
  return status;
}

// The one kernel of a short name; under the registry's mutex.
Kernel& kernel_of(const std::string& name) {
  Kernel* found = nullptr;
  for (auto& [function, kernel] : registry().kernels) {
    if (kernel.name() != name) continue;
    check(found == nullptr, "simulator: two kernels are called ", name);
    found = &kernel;
  }
  check(found != nullptr, "simulator: no kernel is called ", name);
  return *found;
}

struct ErrorName {
  cudaError_t status;
  const char* name;
};

constexpr ErrorName kErrorNames[] = {
    {cudaSuccess, "cudaSuccess"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice"},
    {cudaErrorInvalidPtx, "cudaErrorInvalidPtx"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge"},
    {cudaErrorNotSupported, "cudaErrorNotSupported"},
};

}  // namespace

std::vector<std::string> kernel_names() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  std::vector<std::string> names;
  for (const auto& [function, kernel] : registry().kernels) names.push_back(kernel.name());
  return names;
}

KernelText text_of(const std::string& name) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  const Kernel& kernel = kernel_of(name);
  return {kernel.text(), kernel.entry};
}

void replace_text(const std::string& name, std::string_view ptx) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  kernel_of(name).replacement = ptx;
}

}  // namespace pelt::sim

using namespace pelt::sim;

extern "C" {

// ---- what objects compiled by nvcc call when they are loaded ----

void** __cudaRegisterFatBinary(void* wrapper) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().modules.push_back(read_fat_binary(wrapper));
  return reinterpret_cast<void**>(&registry().modules.back());
}

void __cudaRegisterFatBinaryEnd(void** /*module*/) {}
void __cudaUnregisterFatBinary(void** /*module*/) {}
// Of managed variables, which there are none of; objects compiled without optimisation name it.
char __cudaInitModule(void** /*module*/) { return 0; }

void __cudaRegisterFunction(void** module, const char* host_function, char* /*device_function*/,
                            const char* entry, int /*most_threads*/, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  Kernel kernel{reinterpret_cast<const Module*>(module), entry, std::nullopt, {}, {}};
  kernel.shared_bytes.fill(kSharedBytesUnasked);
  registry().kernels.emplace(host_function, std::move(kernel));
}

// ---- what the host functions of kernels call, which launch by triple brackets ----
// Launchers use cudaLaunchKernelExC, so nothing ever comes here.

cudaError_t __cudaGetKernel(cudaKernel_t* /*kernel*/, const void* /*host_function*/) {
  return cudaErrorNotSupported;
}

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  pelt::fail("simulator: kernels are launched by cudaLaunchKernelExC, not by triple brackets");
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  pelt::fail("simulator: kernels are launched by cudaLaunchKernelExC, not by triple brackets");
}

// ---- what launchers call ----

cudaError_t cudaDriverGetVersion(int* version) {
  *version = device().driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  *index = current_device();
  return check_driver();
}

// Of the current device only, which is what launchers ask about.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  if (index != current_device()) {
    return refuse(cudaErrorInvalidDevice, "expected the current device, ", current_device(),
                  ", got ", index);
  }
  const Device& of = device();
  *properties = {};
  std::strncpy(properties->name, of.name, sizeof(properties->name) - 1);
  properties->major = of.capability / 10, properties->minor = of.capability % 10;
  properties->sharedMemPerBlockOptin = of.shared_bytes_per_block;
  properties->multiProcessorCount = multiprocessors();
  return check_driver();
}

// Nothing is captured here.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* /*mode*/) {
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return with_kernel(function, [&](Kernel& kernel) {
    *attributes = {};
    attributes->maxThreadsPerBlock = kernel.read().most_threads;
    return refuse(check_image(kernel.read(), kernel.name()));
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return with_kernel(function, [&](Kernel& kernel) {
    const Device& device = pelt::sim::device();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
      return refuse(cudaErrorInvalidValue, "the simulator does not know function attribute ",
                    static_cast<int>(attribute));
    }
    if (value < 0 || static_cast<size_t>(value) > device.shared_bytes_per_block) {
      return refuse(cudaErrorInvalidValue, "kernel ", kernel.name(), ": expected at most ",
                    device.shared_bytes_per_block, " bytes of shared memory in a block of ",
                    device.name, ", got ", value);
    }
    kernel.shared_bytes[current_device()] = static_cast<size_t>(value);
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared_bytes) {
  return with_kernel(function, [&](Kernel& kernel) {
    const Refusal refusal = check_block(kernel.read(), kernel.name(), threads, shared_bytes,
                                        kernel.shared_bytes[current_device()]);
    const bool fits = refusal.status == cudaSuccess;
    *blocks = fits ? blocks_per_multiprocessor(kernel.read(), threads, shared_bytes) : 0;
    return cudaSuccess;
  });
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t /*stream*/) {
  return caught(cudaErrorInvalidValue, [&] {
    mark_written(memory, bytes);
    memset(memory, value, bytes);
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  LaunchRequest request;
  const cudaError_t status = with_kernel(
      function, [&](Kernel& kernel) { return prepare(kernel, *config, arguments, &request); });
  if (status != cudaSuccess) return status;
  return caught(cudaErrorLaunchFailure, [&] {
    run(request);
    return cudaSuccess;
  });
}

const char* cudaGetErrorName(cudaError_t status) {
  for (const ErrorName& error : kErrorNames) {
    if (error.status == status) return error.name;
  }
  return "an error that the simulator does not know";
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == t_fault.status && status != cudaSuccess ? t_fault.text.c_str()
                                                           : cudaGetErrorName(status);
}

}  // extern "C"
