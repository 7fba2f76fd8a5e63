// What the CPU kernels of an operator consist of, for the binding: its *_cpu.cpp files, compiled
// for each instruction set, define it for that one.
#pragma once

#include "common/native_call.h"
#include "cpu/isa.h"

namespace pelt {

template <class Contract, cpu::Isa kIsa>
struct Cpu {
  using Call = NativeCall<Contract, int64_t>;

  // Why the kernels refuse a call, with numbers; empty if they serve it.
  static std::string why_not(const Call& call);

  // As those of the CUDA kernels.
  static void forward(const Call& call, Arena& arena);
  static void backward(const Call& call, Arena& arena);
};

}  // namespace pelt
