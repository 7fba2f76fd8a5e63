// symmetric_kl on the CPU: what forward and backward of one call are given.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pelt::symmetric_kl {

struct CpuInputs {
  cpu::Isa isa = cpu::Isa::kBaseline;  // whose kernels serve it
  bool is_float32 = false;             // z1, z2 and their gradients; else bfloat16
  int64_t T = 0, C = 0;
  const void* z1 = nullptr;  // [T, C]
  const void* z2 = nullptr;  // [T, C]
  int64_t z1_stride = 0;     // from row to row, in elements
  int64_t z2_stride = 0;
  const bool* mask = nullptr;  // [T]
  int threads = 1;
};

// Each row's value goes to `rows`, their mean to `loss`. Rows that do not count have 0 in both.
template <cpu::Isa kIsa>
void forward_on_cpu(const CpuInputs& in, float* rows, float* lse, float* loss);  // [T], [2, T], []

template <cpu::Isa kIsa>
void backward_on_cpu(const CpuInputs& in, const float* dloss, const float* lse, void* dz1,
                     void* dz2);  // [], [2, T], [T, C], [T, C]; null where not wanted

}  // namespace pelt::symmetric_kl
