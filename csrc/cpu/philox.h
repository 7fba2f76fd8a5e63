// Dropout's keep-mask on the CPU. The contract of the bits is in cuda/philox.cuh.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/isa.h"

namespace pelt::cpu {

// Writes one element for each of `rows` x `columns`: `kept_bits` where dropout keeps it, 0
// elsewhere. So the elements may be of any type in which zero is all bits zero.
struct DropoutFill {
  void* out = nullptr;  // [rows, columns]
  int64_t rows = 0;
  int64_t columns = 0;
  int element_bytes = 1;     // 1, 2, 4 or 8
  uint64_t kept_bits = 1;    // what a kept element holds
  uint32_t threshold = 0;    // floor(p 2^32); 0 keeps everything
  uint64_t seed = 0;         // the key of Philox
  uint64_t first_group = 0;  // the counter of the first four elements
  int threads = 1;
};

template <Isa kIsa>
void fill_dropout(const DropoutFill& fill);

// The generator itself, for tests against its published values: counter and key in 64-bit halves,
// low half first.
template <Isa kIsa>
void philox_block(const uint64_t (&counter)[2], uint64_t key, std::array<uint32_t, 4>& words);

}  // namespace pelt::cpu
