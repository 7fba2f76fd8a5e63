// The ways into an operator's CPU kernels, chosen by what activations are.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include "common/arena.h"
#include "common/dtype.h"

namespace pelt::cpu {
namespace {

// Calls run(T{}) with the type of activations.
template <class Run>
inline void with_type(DType dtype, Run&& run) {
  if (dtype == DType::kF32) {
    run(float{});
  } else {
    run(bf16{});
  }
}

// A direction of an operator: a struct made of the call, which takes its arrays with place(arena)
// and computes with run<T>() on activations of type T.
template <class Direction, class Call>
inline void run(const Call& call, Arena& arena) {
  Direction direction(call);
  direction.place(arena);
  if (arena.only_counts) return;
  with_type(call.dtype, [&](auto zero) { direction.template run<decltype(zero)>(); });
}

}  // namespace
}  // namespace pelt::cpu
