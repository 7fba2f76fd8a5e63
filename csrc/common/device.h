// What launches have to know of a GPU. It is asked once for each device, under the device of the
// call: a host may have GPUs of several kinds.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>

#include "common/check.h"

namespace pelt {

// The sentence is made of its parts only where something failed.
template <class... Parts>
void check_cuda(cudaError_t status, const Parts&... what) {
  if (status == cudaSuccess) return;
  fail(what..., ": ", cudaGetErrorName(status), " (", static_cast<int>(status),
       "): ", cudaGetErrorString(status));
}

constexpr int kMaxDevices = 64;

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check(device < kMaxDevices, "expected a device below ", kMaxDevices, ", got ", device);
  return device;
}

// A value for each device, found out by whoever asks first.
template <class T>
class OfEachDevice {
 public:
  template <class Find>
  const T& get(Find&& find) {
    const int device = current_device();
    std::call_once(is_known_[device], [&] { values_[device] = find(device); });
    return values_[device];
  }

 private:
  std::array<std::once_flag, kMaxDevices> is_known_;
  std::array<T, kMaxDevices> values_;
};

struct Device {
  std::string name;
  int capability = 0;       // 10 times the major number, and the minor one
  size_t shared_bytes = 0;  // of a block that asks for as much as there is
  int multiprocessors = 0;
};

// The current one.
inline const Device& device() {
  static OfEachDevice<Device> devices;
  return devices.get([](int index) {
    cudaDeviceProp found;
    check_cuda(cudaGetDeviceProperties(&found, index), "cudaGetDeviceProperties");
    return Device{found.name, 10 * found.major + found.minor, found.sharedMemPerBlockOptin,
                  found.multiProcessorCount};
  });
}

inline size_t max_shared_bytes() { return device().shared_bytes; }
inline int multiprocessors() { return device().multiprocessors; }

// Brings a kernel onto the current device. Left alone, a driver does that at the first launch, which
// may be inside the capture of a graph, and there only a thread whose mode is relaxed may load.
inline cudaError_t load_kernel(const void* kernel) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  return status;
}

// The compute capabilities that this module holds machine code or PTX for, as "8.0, 9.0".
std::string image_capabilities();

// Why no kernel of this module runs on the current device, in one sentence: a driver that is too
// old, a GPU that is too old, or another one than those that the module was built for. Empty if they
// run.
std::string why_not_device();

}  // namespace pelt
