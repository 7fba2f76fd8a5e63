// masked_weight on the CPU: what forward and backward of one call are given.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pelt::masked_weight {

// Flat indices of entries have this many.
constexpr int64_t kMaxCpuEntries = int64_t{1} << 32;

struct CpuInputs {
  cpu::Isa isa = cpu::Isa::kBaseline;  // whose kernels serve it
  bool is_float32 = false;             // w0, y, dy and dw0; else bfloat16. Factors are float32.
  int64_t Dout = 0, Din = 0, R = 0, R2 = 0;
  const void* w0 = nullptr;    // [Dout, Din]
  int64_t w0_stride = 0;       // from row to row, in elements
  const float* u = nullptr;    // [Dout, R]
  const float* v = nullptr;    // [R, Din]
  const float* a = nullptr;    // [Dout, R2]
  const float* b = nullptr;    // [R2, Din]
  const float* row = nullptr;  // [Dout]
  const float* col = nullptr;  // [Din]
  int64_t keep = 0;
  float beta = 1.0f;
  float alpha1 = 1.0f;
  float alpha2 = 1.0f;
  int threads = 1;
};

struct CpuBackward {
  const void* dy = nullptr;    // [Dout, Din]
  const bool* mask = nullptr;  // [Dout, Din]
  void* dw0 = nullptr;         // [Dout, Din]; the others are float32, and all are wanted
  float* du = nullptr;         // [Dout, R]
  float* dv = nullptr;         // [R, Din]
  float* da = nullptr;         // [Dout, R2]
  float* db = nullptr;         // [R2, Din]
  float* drow = nullptr;       // [Dout]
  float* dcol = nullptr;       // [Din]
};

// Bytes of memory that a call needs beside its inputs and outputs.
template <cpu::Isa kIsa>
int64_t forward_bytes_on_cpu(const CpuInputs& in);

template <cpu::Isa kIsa>
int64_t backward_bytes_on_cpu(const CpuInputs& in);

template <cpu::Isa kIsa>
void forward_on_cpu(const CpuInputs& in, void* y, bool* mask, void* workspace);  // [Dout, Din]

template <cpu::Isa kIsa>
void backward_on_cpu(const CpuInputs& in, const CpuBackward& grad, void* workspace);

}  // namespace pelt::masked_weight
