// Sixteen bytes: the widest access a thread makes, eight 2-byte elements or four floats.
#pragma once

#include <cstdint>

namespace pelt {

struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace pelt
