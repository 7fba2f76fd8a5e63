#include "bindings/bind.h"

#if defined(PELT_HAS_CPU_KERNELS)
#include "cpu/isa.h"
#include "ops/symmetric_kl/cpu.h"
#endif

namespace pelt::bindings {

namespace {

#if defined(PELT_HAS_CPU_KERNELS)
using namespace pelt::symmetric_kl;

void bind_on_cpu(py::module_& m) {
  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "SymmetricKlCpuInputs")
      .def(py::init([](bool is_float32, int64_t T, int64_t C, Address z1, Address z2,
                       int64_t z1_stride, int64_t z2_stride, Address mask, int threads) {
             return CpuInputs{is_float32,           T,      C, at(z1), at(z2), z1_stride, z2_stride,
                              at<const bool>(mask), threads};
           }),
           py::kw_only(), py::arg("is_float32"), py::arg("T"), py::arg("C"), py::arg("z1"),
           py::arg("z2"), py::arg("z1_stride"), py::arg("z2_stride"), py::arg("mask"),
           py::arg("threads"));

  m.def(
      "symmetric_kl_cpu_fwd",
      [](const CpuInputs& inputs, Address rows, Address lse, Address loss) {
        cpu::with_isa([&](auto isa) {
          forward_on_cpu<decltype(isa)::value>(inputs, at<float>(rows), at<float>(lse),
                                               at<float>(loss));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("rows"), py::arg("lse"), py::arg("loss"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "symmetric_kl_cpu_bwd",
      [](const CpuInputs& inputs, Address dloss, Address lse, Address dz1, Address dz2) {
        cpu::with_isa([&](auto isa) {
          backward_on_cpu<decltype(isa)::value>(inputs, at<const float>(dloss),
                                                at<const float>(lse), at(dz1), at(dz2));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dloss"), py::arg("lse"), py::arg("dz1"),
      py::arg("dz2"), py::call_guard<py::gil_scoped_release>());
}

#endif

}  // namespace

void bind_symmetric_kl([[maybe_unused]] py::module_& m) {
#if defined(PELT_HAS_CPU_KERNELS)
  bind_on_cpu(m);
#endif
}

}  // namespace pelt::bindings
