// What a CUDA driver refuses before a kernel runs: more threads, blocks or shared memory than a
// device has, or than the kernel promises.
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "sim/launch_request.h"
#include "sim/module.h"

namespace pelt::sim {

// Of the current device, which launches that are counted have as it is; others have few, so that
// tests take several rounds.
int multiprocessors();

// How many blocks of a kernel a multiprocessor holds at once, as far as PTX tells. It does not tell
// registers: where launches are counted they are taken to suffice for as many blocks as the
// kernel's bounds promise, which is what the assembler then aims at.
int blocks_per_multiprocessor(const KernelHeader& header, int threads, size_t shared_bytes);

struct Refusal {
  cudaError_t status = cudaSuccess;  // where nothing is refused
  std::string text;
};

// Whether the kernel's code runs on the current device.
Refusal check_image(const KernelHeader& header, const std::string& kernel);

// The same, with a block. `granted` bytes of shared memory were asked for.
Refusal check_block(const KernelHeader& header, const std::string& kernel, int64_t threads,
                    size_t shared_bytes, size_t granted);

// The same, with the grid and the parameters.
Refusal check_launch(const KernelHeader& header, const LaunchRequest& request, size_t granted);

}  // namespace pelt::sim
