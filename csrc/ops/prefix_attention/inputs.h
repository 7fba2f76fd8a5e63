// A call of prefix_attention with what follows from its sizes, for the CUDA and the CPU kernels.
#pragma once

#include <cstdint>

#include "ops/prefix_attention/contract.h"

namespace pelt::prefix_attention {

constexpr int kMaxPrefixes = kPrefixV - kPrefixK;

// The forms of the CUDA kernels, by their place in FORMS (native.py).
enum Form : int { kSingle, kComposed };

// Prefix columns and own columns (the model's own keys) are one axis of P + N columns: `column`
// always means a position on it.
template <class Int>
struct Inputs : NativeCall<Contract, Int> {
  Int P = 0;                     // the sum of P_i
  Int first[kMaxPrefixes] = {};  // each prefix's first column
  int prefixes = 0;
  // In elements, of samples and of heads; 0 where one serves all.
  int64_t bias_batch_stride = 0;
  int64_t bias_head_stride = 0;
  PhiloxKeys dropout_keys;  // of its seed

  Inputs() = default;

  explicit Inputs(const NativeCall<Contract, Int>& call) : NativeCall<Contract, Int>(call) {
    prefixes = this->P_i.count;
    for (int i = 0; i < prefixes; ++i) {
      first[i] = P;
      P += this->P_i.at[i];
      if (this->input[kPrefixIndex + i] != nullptr) continue;
      // A shared prefix [P_i, G, E] is a table of one member.
      this->A_i.at[i] = 1;
      for (int tensor : {kPrefixK + i, kPrefixV + i}) {
        int64_t (&stride)[3] = this->stride[tensor];
        stride[2] = stride[1], stride[1] = stride[0], stride[0] = 0;
      }
    }
    const int64_t matrix = static_cast<int64_t>(this->S) * this->N;  // of the bias
    if (!is_bias_shared_by_heads()) bias_head_stride = matrix;
    if (!is_bias_shared_by_batch()) {
      bias_batch_stride = is_bias_shared_by_heads() ? matrix : this->H * matrix;
    }
    dropout_keys = PhiloxKeys::of(this->dropout.seed);
  }

  PELT_HOST_DEVICE bool has_gate() const { return this->input[kGate] != nullptr; }
  PELT_HOST_DEVICE bool has_gate_per_head() const { return this->rank[kGate] == 2; }
  PELT_HOST_DEVICE bool has_bias() const { return this->input[kBias] != nullptr; }
  // Of the bias its dimensions that may be 1 are told beside their number (_native_call.py).
  PELT_HOST_DEVICE bool is_bias_shared_by_batch() const { return (this->rank[kBias] & 16) != 0; }
  PELT_HOST_DEVICE bool is_bias_shared_by_heads() const { return (this->rank[kBias] & 32) != 0; }

  // Where the first tile of columns from `column` on begins: dropout's words are of four columns
  // from a multiple of 4 on.
  PELT_HOST_DEVICE Int tiles_from(Int column) const {
    return this->dropout.is_active() ? column / 4 * 4 : column;
  }

  // The mask [N] of a sample, or null.
  PELT_HOST_DEVICE const bool* mask_of(Int b) const {
    if (this->input[kKeyMask] == nullptr) return nullptr;
    return static_cast<const bool*>(this->input[kKeyMask]) + static_cast<int64_t>(b) * this->N;
  }

  // Which members of the tables the samples use [B]; null for a prefix that they share.
  PELT_HOST_DEVICE const int64_t* index_of(int prefix) const {
    return static_cast<const int64_t*>(this->input[kPrefixIndex + prefix]);
  }

  PELT_HOST_DEVICE const int64_t* lengths() const {
    return static_cast<const int64_t*>(this->input[kLengths]);
  }
};

}  // namespace pelt::prefix_attention
