// One product of two tiles, for tests: that a processor's own bits are those of the simulated
// tiles.
#include "cpu/tile_product.h"
#include "cpu/tiles.h"

namespace pelt::cpu {

template <>
bool tile_product<Isa::PELT_CPU_ISA>(const TileProduct& product) {
#if defined(PELT_HAS_TILES)
  const TileScope scope;
  tile_load<0>(product.c, 64);
  tile_load<1>(product.a, 64);
  tile_load<2>(product.b, 64);
  tile_multiply<0, 1, 2>();
  tile_store<0>(product.c, 64);
  return true;
#else
  (void)product;
  return false;
#endif
}

}  // namespace pelt::cpu
