// What a call asks for, as CUDA and CPU kernels both see it:
//
//   h = W_down pre_norm(x) + b_down
//   y = residual + scale g dropout(post_norm(W_up phi(h) + b_up))
//
// Names and shapes of inputs and outputs are in contract.h. In an unnamed namespace for the sake of
// the CPU kernels, see cpu/isa.h.
#pragma once

#include "ops/gated_adapter/contract.h"

namespace pelt::gated_adapter {
namespace {

template <class Int>
using CallOf = NativeCall<Contract, Int>;

template <class Int>
PELT_HOST_DEVICE int64_t rows_of(const CallOf<Int>& in) {
  return static_cast<int64_t>(in.B) * in.S;
}

// The gate is sigmoid(w . x + b), by itself or pooled over the sentence.
template <class Int>
PELT_HOST_DEVICE bool has_learned_gate(const CallOf<Int>& in) {
  return in.input[kGateWeight] != nullptr;
}
template <class Int>
PELT_HOST_DEVICE bool has_pooled_gate(const CallOf<Int>& in) {
  return has_learned_gate(in) && in.pooling != Pooling::kToken;
}
// A given gate is [B, S], not [B].
template <class Int>
PELT_HOST_DEVICE bool has_gate_per_row(const CallOf<Int>& in) {
  return in.rank[kGate] == 2;
}

// Rows whose gate is below a threshold keep their residual.
template <class Int>
PELT_HOST_DEVICE bool has_skip(const CallOf<Int>& in) {
  return in.skip_below > -INFINITY;
}

template <class Int>
PELT_HOST_DEVICE bool has_pre_norm(const CallOf<Int>& in) {
  return in.input[kPreNormWeight] != nullptr;
}
template <class Int>
PELT_HOST_DEVICE bool has_post_norm(const CallOf<Int>& in) {
  return in.input[kPostNormWeight] != nullptr;
}

// Norms are banks, of which a sentence has the member that its projection has.
template <class Int>
PELT_HOST_DEVICE bool has_pre_norm_bank(const CallOf<Int>& in) {
  return in.rank[kPreNormWeight] == 2;
}
template <class Int>
PELT_HOST_DEVICE bool has_post_norm_bank(const CallOf<Int>& in) {
  return in.rank[kPostNormWeight] == 2;
}

// Sentences choose their members of a bank, instead of one for all.
template <class Int>
PELT_HOST_DEVICE bool has_down_index_per_sample(const CallOf<Int>& in) {
  return in.rank[kDownIndex] == 1;
}
template <class Int>
PELT_HOST_DEVICE bool has_up_index_per_sample(const CallOf<Int>& in) {
  return in.rank[kUpIndex] == 1;
}
template <class Int>
PELT_HOST_DEVICE bool has_weights_per_sample(const CallOf<Int>& in) {
  return has_down_index_per_sample(in) || has_up_index_per_sample(in);
}

}  // namespace
}  // namespace pelt::gated_adapter
