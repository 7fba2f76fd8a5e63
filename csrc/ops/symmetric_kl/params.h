// symmetric_kl: the mean over rows of 0.5 [KL(p2 ‖ p1) + KL(p1 ‖ p2)], p = softmax(z).
//
// Plain pointers, sizes and numbers, filled in by the binding. A null pointer is an input that is
// not there. Shapes are the contract's (pelt_kernels/ops/symmetric_kl/contract.py), in its letters.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/launch.h"

namespace pelt::symmetric_kl {

struct Inputs {
  DType dtype = DType::kBF16;
  int64_t T = 0;
  int C = 0;

  const void* z1 = nullptr;    // [T, C]
  const void* z2 = nullptr;    // [T, C]
  const bool* mask = nullptr;  // [T]
};

struct ForwardParams {
  Inputs in;
  float* loss = nullptr;  // []
  float* lse = nullptr;   // [2, T]
  float* rows = nullptr;  // [T], each row's value
  int* ticket = nullptr;  // blocks that have finished their rows; zero at first
};

struct BackwardParams {
  Inputs in;
  const float* dloss = nullptr;  // []
  const float* lse = nullptr;    // [2, T]
  void* dz1 = nullptr;           // [T, C]; null where not wanted
  void* dz2 = nullptr;           // [T, C]
};

// Why the kernels refuse a call, with numbers; empty if they serve it.
std::string why_not(int64_t T, int64_t C);

// Bytes of device memory that a forward launch needs beside its inputs and outputs.
int64_t forward_workspace_bytes(const Inputs& in);

void launch_symmetric_kl_fwd(const ForwardParams& params, void* workspace, Stream stream);
void launch_symmetric_kl_bwd(const BackwardParams& params, Stream stream);

// One for each architecture's files; launch.cpp chooses.
void launch_symmetric_kl_fwd_sm80(ForwardParams params, void* workspace, Stream stream);
void launch_symmetric_kl_bwd_sm80(const BackwardParams& params, Stream stream);

}  // namespace pelt::symmetric_kl
