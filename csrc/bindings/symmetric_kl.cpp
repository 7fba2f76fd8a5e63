#include "bindings/bind.h"

#if defined(PELT_HAS_CUDA_KERNELS)
#include "ops/symmetric_kl/params.h"
#endif
#include "cpu/isa.h"
#include "ops/symmetric_kl/cpu.h"

namespace pelt::bindings {

namespace {

using namespace pelt::symmetric_kl;

#if defined(PELT_HAS_CUDA_KERNELS)
void bind_on_cuda(py::module_& m) {
  m.def("symmetric_kl_why_not", &why_not, py::kw_only(), py::arg("T"), py::arg("C"));

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<Inputs>(m, "SymmetricKlInputs", py::module_local())
      .def(py::init([](int dtype, int64_t T, int C, Address z1, Address z2, Address mask) {
             return Inputs{static_cast<DType>(dtype), T, C, at(z1), at(z2), at<const bool>(mask)};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("T"), py::arg("C"), py::arg("z1"),
           py::arg("z2"), py::arg("mask"))
      .def_property_readonly("forward_workspace_bytes", &forward_workspace_bytes);

  m.def(
      "symmetric_kl_fwd",
      [](const Inputs& inputs, Address loss, Address lse, Address workspace, Address stream) {
        ForwardParams params;
        params.in = inputs;
        params.loss = at<float>(loss);
        params.lse = at<float>(lse);
        launch_symmetric_kl_fwd(params, at(workspace), at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("loss"), py::arg("lse"), py::arg("workspace"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "symmetric_kl_bwd",
      [](const Inputs& inputs, Address dloss, Address lse, Address dz1, Address dz2,
         Address stream) {
        const BackwardParams params{inputs, at<const float>(dloss), at<const float>(lse), at(dz1),
                                    at(dz2)};
        launch_symmetric_kl_bwd(params, at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("dloss"), py::arg("lse"), py::arg("dz1"),
      py::arg("dz2"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif

void bind_on_cpu(py::module_& m) {
  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "SymmetricKlCpuInputs", py::module_local())
      .def(py::init([](bool is_float32, int64_t T, int64_t C, Address z1, Address z2,
                       int64_t z1_stride, int64_t z2_stride, Address mask, int threads,
                       const std::string& isa) {
             return CpuInputs{
                 cpu::isa_by_name(isa), is_float32, T, C, at(z1), at(z2), z1_stride, z2_stride,
                 at<const bool>(mask),  threads};
           }),
           py::kw_only(), py::arg("is_float32"), py::arg("T"), py::arg("C"), py::arg("z1"),
           py::arg("z2"), py::arg("z1_stride"), py::arg("z2_stride"), py::arg("mask"),
           py::arg("threads"), py::arg("isa"));

  m.def(
      "symmetric_kl_cpu_fwd",
      [](const CpuInputs& inputs, Address rows, Address lse, Address loss) {
        cpu::with_isa(inputs.isa, [&](auto isa) {
          forward_on_cpu<decltype(isa)::value>(inputs, at<float>(rows), at<float>(lse),
                                               at<float>(loss));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("rows"), py::arg("lse"), py::arg("loss"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "symmetric_kl_cpu_bwd",
      [](const CpuInputs& inputs, Address dloss, Address lse, Address dz1, Address dz2) {
        cpu::with_isa(inputs.isa, [&](auto isa) {
          backward_on_cpu<decltype(isa)::value>(inputs, at<const float>(dloss),
                                                at<const float>(lse), at(dz1), at(dz2));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dloss"), py::arg("lse"), py::arg("dz1"),
      py::arg("dz2"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_symmetric_kl([[maybe_unused]] py::module_& m) {
  bind_on_cpu(m);
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_on_cuda(m);
#endif
}

}  // namespace pelt::bindings
