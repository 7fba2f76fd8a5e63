// The modules of device code in this program: the PTX that nvcc put into each object, and what a
// launch has to know of a kernel before it runs.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace pelt::sim {

// One object's device code. Its faults are told when a kernel is launched: it registers before
// main(), where nobody could catch them.
struct Module {
  std::string_view ptx;
  std::string fault;  // why there is no PTX; empty if there is
};

// Reads what nvcc hands to __cudaRegisterFatBinary.
Module read_fat_binary(const void* wrapper);

struct KernelParameter {
  std::string name;
  size_t offset;  // they lie one behind the other
};

// What the text of a module says of one kernel, before its instructions.
struct KernelHeader {
  int capability = 0;  // of `.target sm_80`: 80
  std::vector<KernelParameter> parameters;
  size_t parameter_bytes = 0;
  int most_threads = 1024;            // of `.maxntid` and `.reqntid`
  int blocks_per_multiprocessor = 0;  // that `.minnctapersm` promises; 0: none are
};

// Throws Error where the text has no kernel of that name, or is none that this understands.
KernelHeader read_header(std::string_view ptx, std::string_view entry);

// The name of a kernel as people write it, without namespaces and parameters.
std::string short_name(const std::string& entry);

}  // namespace pelt::sim
