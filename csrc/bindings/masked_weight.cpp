#include "bindings/bind.h"

#if defined(PELT_HAS_CPU_KERNELS)
#include <array>
#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/isa.h"
#include "ops/masked_weight/cpu.h"
#endif

namespace pelt::bindings {

namespace {

#if defined(PELT_HAS_CPU_KERNELS)
using namespace pelt::masked_weight;

void bind_on_cpu(py::module_& m) {
  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "MaskedWeightCpuInputs")
      .def(py::init([](bool is_float32, const std::array<int64_t, 4>& sizes, Address w0,
                       int64_t w0_stride, Address u, Address v, Address a, Address b, Address row,
                       Address col, int64_t keep, float beta, float alpha1, float alpha2,
                       int threads) {
             CpuInputs in;
             in.is_float32 = is_float32;
             std::tie(in.Dout, in.Din, in.R, in.R2) = std::tuple_cat(sizes);
             in.w0 = at(w0);
             in.w0_stride = w0_stride;
             in.u = at<const float>(u), in.v = at<const float>(v);
             in.a = at<const float>(a), in.b = at<const float>(b);
             in.row = at<const float>(row), in.col = at<const float>(col);
             in.keep = keep;
             in.beta = beta, in.alpha1 = alpha1, in.alpha2 = alpha2;
             in.threads = threads;
             return in;
           }),
           py::kw_only(), py::arg("is_float32"), py::arg("sizes"), py::arg("w0"),
           py::arg("w0_stride"), py::arg("u"), py::arg("v"), py::arg("a"), py::arg("b"),
           py::arg("row"), py::arg("col"), py::arg("keep"), py::arg("beta"), py::arg("alpha1"),
           py::arg("alpha2"), py::arg("threads"))
      .def_property_readonly("forward_bytes",
                             [](const CpuInputs& in) {
                               return cpu::with_isa([&](auto isa) {
                                 return forward_bytes_on_cpu<decltype(isa)::value>(in);
                               });
                             })
      .def_property_readonly("backward_bytes", [](const CpuInputs& in) {
        return cpu::with_isa(
            [&](auto isa) { return backward_bytes_on_cpu<decltype(isa)::value>(in); });
      });

  m.def(
      "masked_weight_cpu_why_not",
      [](int64_t Dout, int64_t Din) {
        return Dout * Din < kMaxCpuEntries
                   ? std::string()
                   : sentence("its entries have indices of 32 bits, so Dout Din must be below ",
                              kMaxCpuEntries, ", and it is ", Dout * Din);
      },
      py::kw_only(), py::arg("Dout"), py::arg("Din"));

  m.def(
      "masked_weight_cpu_fwd",
      [](const CpuInputs& inputs, Address y, Address mask, Address workspace) {
        cpu::with_isa([&](auto isa) {
          forward_on_cpu<decltype(isa)::value>(inputs, at(y), at<bool>(mask), at(workspace));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("y"), py::arg("mask"), py::arg("workspace"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "masked_weight_cpu_bwd",
      [](const CpuInputs& inputs, Address dy, Address mask, Address dw0, Address du, Address dv,
         Address da, Address db, Address drow, Address dcol, Address workspace) {
        const CpuBackward grad{at(dy),        at<const bool>(mask), at(dw0),
                               at<float>(du), at<float>(dv),        at<float>(da),
                               at<float>(db), at<float>(drow),      at<float>(dcol)};
        cpu::with_isa(
            [&](auto isa) { backward_on_cpu<decltype(isa)::value>(inputs, grad, at(workspace)); });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dy"), py::arg("mask"), py::arg("dw0"),
      py::arg("du"), py::arg("dv"), py::arg("da"), py::arg("db"), py::arg("drow"), py::arg("dcol"),
      py::arg("workspace"), py::call_guard<py::gil_scoped_release>());
}

#endif

}  // namespace

void bind_masked_weight([[maybe_unused]] py::module_& m) {
#if defined(PELT_HAS_CPU_KERNELS)
  bind_on_cpu(m);
#endif
}

}  // namespace pelt::bindings
