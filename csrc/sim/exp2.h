// Host body of cuda/exp2.cuh.
#pragma once

#include <cmath>

namespace pelt {

inline float exp2_approx(float x) { return exp2f(x); }

}  // namespace pelt
