// The way into a direction of an operator on the CPU: a struct made of the call, which puts its
// arrays into a workspace with place(arena), returning how many bytes they take, and computes with
// run<T>() on activations of type T.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include "common/arena.h"
#include "common/dtype.h"

namespace pelt::cpu {
namespace {

template <class Direction, class Call>
inline int64_t bytes_of(const Call& call) {
  return Direction(call).place(Arena{});
}

template <class Direction, class Call>
inline void run(const Call& call) {
  Direction direction(call);
  direction.place(Arena{static_cast<char*>(call.workspace)});
  if (call.dtype == DType::kF32) {
    direction.template run<float>();
  } else {
    direction.template run<bf16>();
  }
}

}  // namespace
}  // namespace pelt::cpu
