// What the small kernels of sound.cu and faults.cu take.
#pragma once

#include "cuda/device.cuh"

namespace pelt::test {

struct Params {
  const uint32_t* in = nullptr;  // 1000, 1001, ...
  uint32_t* out = nullptr;
  int* counters = nullptr;  // zero at first
};

struct Words {
  alignas(16) uint32_t word[256];
};

}  // namespace pelt::test
