// symmetric_kl: the mean over rows of 0.5 [KL(p2 ‖ p1) + KL(p1 ‖ p2)], p = softmax(z).
//
// What the CUDA kernels take: a call, in the order and the letters of contract.h, and pieces of its
// workspace.
#pragma once

#include "common/launch.h"
#include "ops/symmetric_kl/contract.h"

namespace pelt::symmetric_kl {

using Call = NativeCall<Contract, int>;

struct ForwardParams {
  Call in;
  int* ticket = nullptr;  // blocks that have finished their rows; zero at first
  float* rows = nullptr;  // [T], each row's value
};

// One for each architecture's files; launch.cpp chooses.
void launch_forward_sm80(const ForwardParams& params);
void launch_backward_sm80(const Call& call);

}  // namespace pelt::symmetric_kl
