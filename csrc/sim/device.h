// The GPUs that the simulator can stand for: what of them a launch depends on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace pelt::sim {

// Few, and odd: persistent kernels take several rounds, and tiles fall unevenly on blocks. Where
// launches are counted there are as many as the device has.
constexpr int kMultiprocessors = 3;
constexpr int kBlocksPerMultiprocessor = 1;

// Shared memory that a kernel may use without asking for more.
constexpr size_t kSharedBytesUnasked = 48 * 1024;

struct Device {
  const char* name;
  int capability;  // 10 times the major number, and the minor one
  size_t shared_bytes_per_block;
  size_t shared_bytes_per_multiprocessor;
  int multiprocessors;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  // Of the machine that it is in.
  int driver = CUDART_VERSION;  // the newest CUDA that its driver serves, 12040 for 12.4
  bool has_image = true;        // the module was built for it
};

constexpr Device kDevices[] = {
    {"A100", 80, 163 * 1024, 164 * 1024, 108, 2048, 32},
    {"H100", 90, 227 * 1024, 228 * 1024, 132, 2048, 32},
    {"H200", 90, 227 * 1024, 228 * 1024, 132, 2048, 32},
    {"RTX 3090", 86, 99 * 1024, 100 * 1024, 82, 1536, 16},
    {"RTX 4090", 89, 99 * 1024, 100 * 1024, 128, 1536, 24},
    {"L4", 89, 99 * 1024, 100 * 1024, 58, 1536, 24},
    {"T4", 75, 64 * 1024, 64 * 1024, 40, 1024, 16},
};

// The one that kernels run on; at first H100.
const Device& device();

// Its number, another one for each device and machine that was set. It is another one, too, for
// launches that are counted, which have all of the device (see kMultiprocessors).
int current_device();

constexpr int kMostDevices = 64;

// What is changed of a device for a test; 0: nothing.
struct Changes {
  int driver = 0;
  size_t shared_bytes_per_block = 0;
  bool has_image = true;
};

// Throws Error where no device has this name.
void set_device(const std::string& name, const Changes& changes = {});

}  // namespace pelt::sim
