// Errors that carry their numbers. C++ checks only what Python cannot know, and always says what it
// saw.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pelt {

// Every error of the native code; pybind11 turns it into Python's RuntimeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Glues the parts into one sentence: sentence("T=", 12, " rows") is "T=12 rows".
template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(sentence(parts...));
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace pelt
