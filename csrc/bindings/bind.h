// The Python module: `_C` with the CPU and the CUDA kernels, or `_C_sim` with the CUDA kernels on
// the simulator and the CPU kernels on simulated tiles; a file for each operator.
//
// Tensors come as addresses: this folder and everything below it know nothing of torch. Every
// function takes keywords only. A launcher releases the GIL; shapes and dtypes were checked by the
// contract.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#if defined(PELT_SIM) || defined(PELT_WITH_CUDA)
#define PELT_HAS_CUDA_KERNELS 1
#endif

namespace pelt::bindings {

namespace py = pybind11;

using Address = uintptr_t;
// and whether it is float32 beside 16-bit activations
using TypedAddress = std::pair<Address, bool>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_cpu(py::module_& m);

}  // namespace pelt::bindings
