#include "bindings/bind.h"

#if defined(PELT_HAS_CUDA_KERNELS)
#include "ops/masked_weight/params.h"
#endif
#include <array>
#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/isa.h"
#include "ops/masked_weight/cpu.h"

namespace pelt::bindings {

namespace {

using namespace pelt::masked_weight;

#if defined(PELT_HAS_CUDA_KERNELS)
void bind_on_cuda(py::module_& m) {
  auto parameter = [](const TypedAddress& a) { return Parameter{at(a.first), a.second}; };
  auto grad = [](const TypedAddress& a) { return ParameterGrad{at(a.first), a.second}; };

  m.def("masked_weight_why_not", &why_not, py::kw_only(), py::arg("Dout"), py::arg("Din"),
        py::arg("R"), py::arg("R2"));

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<Inputs>(m, "MaskedWeightInputs", py::module_local())
      .def(py::init([=](int dtype, int Dout, int Din, int R, int R2, Address w0, TypedAddress u,
                        TypedAddress v, TypedAddress a, TypedAddress b, TypedAddress row,
                        TypedAddress col, int64_t keep, float beta, float alpha1, float alpha2) {
             Inputs in;
             in.dtype = static_cast<DType>(dtype);
             in.Dout = Dout, in.Din = Din, in.R = R, in.R2 = R2;
             in.w0 = at(w0);
             in.u = parameter(u), in.v = parameter(v);
             in.a = parameter(a), in.b = parameter(b);
             in.row = parameter(row), in.col = parameter(col);
             in.keep = keep;
             in.beta = beta, in.alpha1 = alpha1, in.alpha2 = alpha2;
             return in;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("Dout"), py::arg("Din"), py::arg("R"),
           py::arg("R2"), py::arg("w0"), py::arg("u"), py::arg("v"), py::arg("a"), py::arg("b"),
           py::arg("row"), py::arg("col"), py::arg("keep"), py::arg("beta"), py::arg("alpha1"),
           py::arg("alpha2"))
      .def_property_readonly("forward_workspace_bytes", &forward_workspace_bytes)
      .def_property_readonly("backward_workspace_bytes", &backward_workspace_bytes);

  m.def(
      "masked_weight_fwd",
      [](const Inputs& inputs, Address y, Address mask, Address workspace, Address stream) {
        ForwardParams params;
        params.in = inputs;
        params.y = at(y);
        params.mask = at<bool>(mask);
        launch_masked_weight_fwd(params, at(workspace), at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("y"), py::arg("mask"), py::arg("workspace"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "masked_weight_bwd",
      [=](const Inputs& inputs, Address dy, Address mask, Address dw0, TypedAddress du,
          TypedAddress dv, TypedAddress da, TypedAddress db, TypedAddress drow, TypedAddress dcol,
          Address workspace, Address stream) {
        BackwardParams params;
        params.in = inputs;
        params.dy = at(dy);
        params.mask = at<const bool>(mask);
        params.dw0 = at(dw0);
        params.du = grad(du), params.dv = grad(dv);
        params.da = grad(da), params.db = grad(db);
        params.drow = grad(drow), params.dcol = grad(dcol);
        launch_masked_weight_bwd(params, at(workspace), at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("dy"), py::arg("mask"), py::arg("dw0"),
      py::arg("du"), py::arg("dv"), py::arg("da"), py::arg("db"), py::arg("drow"), py::arg("dcol"),
      py::arg("workspace"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif

void bind_on_cpu(py::module_& m) {
  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "MaskedWeightCpuInputs", py::module_local())
      .def(py::init([](const std::string& isa, bool is_float32, const std::array<int64_t, 4>& sizes,
                       Address w0, int64_t w0_stride, Address u, Address v, Address a, Address b,
                       Address row, Address col, int64_t keep, float beta, float alpha1,
                       float alpha2, int threads) {
             CpuInputs in;
             in.isa = cpu::isa_by_name(isa);
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
           py::kw_only(), py::arg("isa"), py::arg("is_float32"), py::arg("sizes"), py::arg("w0"),
           py::arg("w0_stride"), py::arg("u"), py::arg("v"), py::arg("a"), py::arg("b"),
           py::arg("row"), py::arg("col"), py::arg("keep"), py::arg("beta"), py::arg("alpha1"),
           py::arg("alpha2"), py::arg("threads"))
      .def_property_readonly("forward_bytes",
                             [](const CpuInputs& in) {
                               return cpu::with_isa(in.isa, [&](auto isa) {
                                 return forward_bytes_on_cpu<decltype(isa)::value>(in);
                               });
                             })
      .def_property_readonly("backward_bytes", [](const CpuInputs& in) {
        return cpu::with_isa(
            in.isa, [&](auto isa) { return backward_bytes_on_cpu<decltype(isa)::value>(in); });
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
        cpu::with_isa(inputs.isa, [&](auto isa) {
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
        cpu::with_isa(inputs.isa, [&](auto isa) {
          backward_on_cpu<decltype(isa)::value>(inputs, grad, at(workspace));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dy"), py::arg("mask"), py::arg("dw0"),
      py::arg("du"), py::arg("dv"), py::arg("da"), py::arg("db"), py::arg("drow"), py::arg("dcol"),
      py::arg("workspace"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_masked_weight([[maybe_unused]] py::module_& m) {
  bind_on_cpu(m);
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_on_cuda(m);
#endif
}

}  // namespace pelt::bindings
