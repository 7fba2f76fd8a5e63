// Host body of cuda/opaque.cuh: a host compiler has no registers to save.
#pragma once

namespace pelt {

inline int opaque(int value) { return value; }

}  // namespace pelt
