#include "bindings/bind.h"

namespace pelt::bindings {

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels.";
  bind_cpu(m);
  bind_operators(m);
}

}  // namespace pelt::bindings
