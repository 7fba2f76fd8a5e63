// One call of an operator as its kernels get it: the same for every operator, and for the CUDA and
// the CPU kernels.
//
// Everything stands in the order of the operator's contract, by whose names it is found
// (ops/<operator>/contract.h): `in.input[kX]` is x, `in.grad[kX]` its gradient, `in.D` a size,
// `in.scale` an attribute. The elements of a list are neighbours: element i stands i places after
// the list's name.
#pragma once

#include <cstdint>
#include <string>

#include "common/arena.h"
#include "common/dtype.h"
#include "common/parameter.h"
#include "cuda/philox.cuh"

namespace pelt {

// A list of sizes or of an attribute's values.
template <class T, int kLongest>
struct List {
  int count = 0;  // may be larger than kLongest, for a refusal to tell: then the rest is not here
  T at[kLongest] = {};

  template <class U>
  List& operator=(const List<U, kLongest>& other) {
    count = other.count;
    for (int i = 0; i < kLongest; ++i) at[i] = static_cast<T>(other.at[i]);
    return *this;
  }
  PELT_HOST_DEVICE const T& operator[](int i) const { return at[i]; }
};

// The part that is no number of the contract's own.
template <class Contract>
struct CallTensors {
  static constexpr int kInputs = Contract::kInputCount, kOutputs = Contract::kOutputCount;
  static constexpr int kViews = Contract::kViews > 0 ? Contract::kViews : 1;

  DType dtype = DType::kF32;  // of activations
  int form = 0;               // which of the backend's forms; of CPU kernels the cpu::Isa
  int threads = 1;            // for CPU kernels

  const void* input[kInputs] = {};  // null: not there
  bool is_float32[kInputs] = {};    // which a parameter may be beside 16-bit activations
  int8_t rank[kInputs] = {};        // dimensions: they tell the alternatives of a shape apart
  // Of the inputs that may be views, in elements, from the first dimension on; the last one's is 1.
  int64_t stride[kViews][3] = {};

  void* output[kOutputs] = {};         // written by forward; backward reads those that it saved
  const void* doutput[kOutputs] = {};  // the gradients of outputs
  void* grad[kInputs] = {};            // those of inputs, in the input's dtype; null: not wanted

  void* stream = nullptr;  // of CUDA kernels

  PELT_HOST_DEVICE Parameter parameter(int i) const { return {input[i], is_float32[i]}; }
  PELT_HOST_DEVICE ParameterGrad parameter_grad(int i) const { return {grad[i], is_float32[i]}; }

  template <class T>
  PELT_HOST_DEVICE const T* input_as(int i) const {
    return static_cast<const T*>(input[i]);
  }
  template <class T>
  PELT_HOST_DEVICE T* output_as(int i) const {
    return static_cast<T*>(output[i]);
  }
  template <class T>
  PELT_HOST_DEVICE const T* doutput_as(int i) const {
    return static_cast<const T*>(doutput[i]);
  }
  template <class T>
  PELT_HOST_DEVICE T* grad_as(int i) const {
    return static_cast<T*>(grad[i]);
  }
};

// `Int` counts sizes: in 32 bits in CUDA kernels. Trivially copyable, so that it may be a part of a
// kernel's parameter.
//
// The order of the bases matters: nvcc 13.0 places a base behind one that ends in padding at an
// offset of its own, other than the host compiler's and not aligned, so that kernels would read
// other members than the launcher wrote. So pointers come first and end in one, and what may end in
// padding is followed by nothing that needs a larger alignment.
template <class Contract, class Int>
struct NativeCall : CallTensors<Contract>, Contract::Attributes, Contract::template Sizes<Int> {
  NativeCall() = default;

  template <class Wide>
  explicit NativeCall(const NativeCall<Contract, Wide>& wide)
      : CallTensors<Contract>(wide), Contract::Attributes(wide) {
    Contract::for_each_size([](auto& to, const auto& from) { to = from; }, *this, wide);
  }
};

// What the CUDA kernels of an operator consist of, for the binding. Its launch.cpp defines them.
template <class Contract>
struct Cuda {
  using Call = NativeCall<Contract, int>;

  // Why the kernels refuse a call, with numbers; empty if they serve it. Sizes may be of any size.
  static std::string why_not(const NativeCall<Contract, int64_t>& call);

  // Each takes its workspace from the arena and launches. Where the arena only counts, tensors are
  // there or not and gradients wanted or not, but none may be read, and nothing is launched.
  static void forward(const Call& call, Arena& arena);
  static void backward(const Call& call, Arena& arena);
};

}  // namespace pelt
