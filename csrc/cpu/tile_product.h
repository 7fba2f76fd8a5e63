// One product of tiles, for tests (csrc/cpu/tiles.h).
#pragma once

#include "common/dtype.h"
#include "cpu/isa.h"

namespace pelt::cpu {

struct TileProduct {
  const bf16* a = nullptr;  // [16, 32]
  const bf16* b = nullptr;  // [16 pairs, 16, 2]
  float* c = nullptr;       // [16, 16], added to
};

// False where the instruction set has no tiles.
template <Isa kIsa>
bool tile_product(const TileProduct& product);

}  // namespace pelt::cpu
