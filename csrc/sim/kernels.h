// The kernels in this program by their short names, for tests that run a changed text in the place
// of a kernel's own.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace pelt::sim {

// What a kernel runs from: the text of its module, and its name there.
struct KernelText {
  std::string_view ptx;
  std::string entry;
};

std::vector<std::string> kernel_names();

// Throws Error unless exactly one kernel has this name.
KernelText text_of(const std::string& name);

// Lets a kernel run from another text, which stays where it is; from its own if that is empty.
void replace_text(const std::string& name, std::string_view ptx);

}  // namespace pelt::sim
