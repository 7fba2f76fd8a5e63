// Loops whose counter is a constant in their body, where an instruction takes a number as part of
// itself: an unrolled loop's counter is a constant to the optimiser, but not to an asm statement.
#pragma once

#include <utility>

namespace pelt {

template <class Body, int... kIndices>
__device__ __forceinline__ void for_each_constant(std::integer_sequence<int, kIndices...>,
                                                  Body&& body) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}

// Calls body(i) for i = 0, ..., kCount - 1; decltype(i)::value is the number.
template <int kCount, class Body>
__device__ __forceinline__ void for_constants(Body&& body) {
  for_each_constant(std::make_integer_sequence<int, kCount>{}, body);
}

}  // namespace pelt
