// Static dispatch without macros: a list of configurations, tried in order.
//
// A kernel file ends with `using Configs = TypeList<...>`. That list is the build matrix, the
// support matrix and the documentation at once: the launcher and `why_not` walk the same one.
#pragma once

#include <cstddef>

namespace pelt {

template <class... Types>
struct TypeList {
  static constexpr std::size_t kSize = sizeof...(Types);
};

// Carries a type as a value, so that a lambda can take a configuration as its argument.
template <class T>
struct TypeTag {
  using type = T;
};

// Calls run(TypeTag<Config>) for the first Config with fits(TypeTag<Config>); false if there is
// none.
template <class... Types, class Fits, class Run>
bool run_first_fit(TypeList<Types...>, Fits&& fits, Run&& run) {
  return ((fits(TypeTag<Types>{}) && (run(TypeTag<Types>{}), true)) || ...);
}

// True if any Config of the list satisfies the predicate.
template <class... Types, class Predicate>
bool any_of(TypeList<Types...>, Predicate&& predicate) {
  return (predicate(TypeTag<Types>{}) || ...);
}

}  // namespace pelt
