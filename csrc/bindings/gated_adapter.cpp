#include "bindings/bind.h"

#if defined(PELT_HAS_CUDA_KERNELS)
#include "ops/gated_adapter/params.h"
#endif
#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "ops/gated_adapter/cpu.h"

namespace pelt::bindings {

namespace {

using namespace pelt::gated_adapter;

#if defined(PELT_HAS_CUDA_KERNELS)
void bind_on_cuda(py::module_& m) {
  auto parameter = [](const TypedAddress& a) { return Parameter{at(a.first), a.second}; };
  auto grad = [](const TypedAddress& a) { return ParameterGrad{at(a.first), a.second}; };

  m.def(
      "gated_adapter_why_not",
      [](int dtype, int64_t B, int64_t S, int64_t D, int64_t R) {
        return why_not(static_cast<DType>(dtype), B, S, D, R);
      },
      py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("S"), py::arg("D"), py::arg("R"));

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<Inputs>(m, "GatedAdapterInputs", py::module_local())
      .def(py::init([=](int dtype, int B, int S, int D, int R, Address x, TypedAddress w_down,
                        TypedAddress b_down, TypedAddress w_up, TypedAddress b_up,
                        Address down_index, Address up_index, TypedAddress pre_norm_weight,
                        TypedAddress pre_norm_bias, TypedAddress post_norm_weight,
                        TypedAddress post_norm_bias, TypedAddress scale, TypedAddress gate,
                        TypedAddress gate_weight, TypedAddress gate_bias, Address mask,
                        Address residual, int down_members, int up_members,
                        bool has_down_index_per_sample, bool has_up_index_per_sample,
                        bool has_gate_per_row, int activation, int pooling, int residual_from,
                        float scale_value, float pre_norm_eps, float post_norm_eps,
                        double dropout_p, uint64_t seed, bool has_skip, float skip_below) {
             Inputs in;
             in.dtype = static_cast<DType>(dtype);
             in.B = B, in.S = S, in.D = D, in.R = R;
             in.x = at(x);
             in.w_down = parameter(w_down);
             in.b_down = parameter(b_down);
             in.w_up = parameter(w_up);
             in.b_up = parameter(b_up);
             in.down_index = at<const int64_t>(down_index);
             in.up_index = at<const int64_t>(up_index);
             in.pre_norm_weight = parameter(pre_norm_weight);
             in.pre_norm_bias = parameter(pre_norm_bias);
             in.post_norm_weight = parameter(post_norm_weight);
             in.post_norm_bias = parameter(post_norm_bias);
             in.scale = parameter(scale);
             in.gate = parameter(gate);
             in.gate_weight = parameter(gate_weight);
             in.gate_bias = parameter(gate_bias);
             in.mask = at<const bool>(mask);
             in.residual = at(residual);
             in.down_members = down_members;
             in.up_members = up_members;
             in.has_down_index_per_sample = has_down_index_per_sample;
             in.has_up_index_per_sample = has_up_index_per_sample;
             in.has_gate_per_row = has_gate_per_row;
             in.activation = static_cast<Activation>(activation);
             in.pooling = static_cast<Pooling>(pooling);
             in.residual_from = static_cast<ResidualFrom>(residual_from);
             in.scale_value = scale_value;
             in.pre_norm_eps = pre_norm_eps;
             in.post_norm_eps = post_norm_eps;
             in.dropout = Dropout::with_probability(dropout_p, seed);
             in.has_skip = has_skip;
             in.skip_below = skip_below;
             return in;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("S"), py::arg("D"), py::arg("R"),
           py::arg("x"), py::arg("w_down"), py::arg("b_down"), py::arg("w_up"), py::arg("b_up"),
           py::arg("down_index"), py::arg("up_index"), py::arg("pre_norm_weight"),
           py::arg("pre_norm_bias"), py::arg("post_norm_weight"), py::arg("post_norm_bias"),
           py::arg("scale"), py::arg("gate"), py::arg("gate_weight"), py::arg("gate_bias"),
           py::arg("mask"), py::arg("residual"), py::arg("down_members"), py::arg("up_members"),
           py::arg("has_down_index_per_sample"), py::arg("has_up_index_per_sample"),
           py::arg("has_gate_per_row"), py::arg("activation"), py::arg("pooling"),
           py::arg("residual_from"), py::arg("scale_value"), py::arg("pre_norm_eps"),
           py::arg("post_norm_eps"), py::arg("dropout_p"), py::arg("seed"), py::arg("has_skip"),
           py::arg("skip_below"))
      .def_property_readonly("forward_workspace_bytes", &forward_workspace_bytes)
      .def_property_readonly("backward_workspace_bytes", &backward_workspace_bytes);

  m.def(
      "gated_adapter_fwd",
      [](const Inputs& inputs, Address y, Address gate_value, Address h, Address workspace,
         Address stream) {
        ForwardParams params;
        params.in = inputs;
        params.y = at(y);
        params.gate_value = at<float>(gate_value);
        params.h = at(h);
        launch_gated_adapter_fwd(params, at(workspace), at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("y"), py::arg("gate_value"), py::arg("h"),
      py::arg("workspace"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "gated_adapter_bwd",
      [=](const Inputs& inputs, Address dy, Address gate_value, Address h, Address dx,
          TypedAddress dw_down, TypedAddress db_down, TypedAddress dw_up, TypedAddress db_up,
          TypedAddress dpre_norm_weight, TypedAddress dpre_norm_bias,
          TypedAddress dpost_norm_weight, TypedAddress dpost_norm_bias, TypedAddress dscale,
          TypedAddress dgate, TypedAddress dgate_weight, TypedAddress dgate_bias, Address workspace,
          Address stream) {
        BackwardParams params;
        params.in = inputs;
        params.dy = at(dy);
        params.gate_value = at<const float>(gate_value);
        params.h = at(h);
        params.dx = at(dx);
        params.dw_down = grad(dw_down);
        params.db_down = grad(db_down);
        params.dw_up = grad(dw_up);
        params.db_up = grad(db_up);
        params.dpre_norm_weight = grad(dpre_norm_weight);
        params.dpre_norm_bias = grad(dpre_norm_bias);
        params.dpost_norm_weight = grad(dpost_norm_weight);
        params.dpost_norm_bias = grad(dpost_norm_bias);
        params.dscale = grad(dscale);
        params.dgate = grad(dgate);
        params.dgate_weight = grad(dgate_weight);
        params.dgate_bias = grad(dgate_bias);
        launch_gated_adapter_bwd(params, at(workspace), at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("dy"), py::arg("gate_value"), py::arg("h"),
      py::arg("dx"), py::arg("dw_down"), py::arg("db_down"), py::arg("dw_up"), py::arg("db_up"),
      py::arg("dpre_norm_weight"), py::arg("dpre_norm_bias"), py::arg("dpost_norm_weight"),
      py::arg("dpost_norm_bias"), py::arg("dscale"), py::arg("dgate"), py::arg("dgate_weight"),
      py::arg("dgate_bias"), py::arg("workspace"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}
#endif

// A call without its tensors is made once and kept; forward and backward take the addresses of the
// contract's inputs, in its order.
void bind_on_cpu(py::module_& m) {
  using Addresses = std::array<Address, kInputs>;
  auto with_inputs = [](const CpuCall& plan, const Addresses& inputs, Address workspace,
                        uint64_t seed, int threads) {
    CpuCall call = plan;
    std::transform(inputs.begin(), inputs.end(), call.input, [](Address a) { return at(a); });
    call.workspace = at(workspace), call.seed = seed, call.threads = threads;
    return call;
  };
  py::class_<CpuCall>(m, "GatedAdapterCpu", py::module_local())
      .def(py::init([](const std::string& isa, int dtype, uint32_t masters,
                       const std::array<int64_t, 6>& sizes,
                       const std::array<bool, 3>& per_sample_or_row, int activation, int pooling,
                       int residual_from, const std::array<float, 3>& scale_and_eps, bool has_skip,
                       float skip_below, uint32_t threshold, float dropout_scale) {
             CpuCall call;
             call.isa = cpu::isa_by_name(isa);
             call.dtype = static_cast<DType>(dtype), call.masters = masters;
             std::tie(call.B, call.S, call.D, call.R, call.M, call.M_up) = std::tuple_cat(sizes);
             std::tie(call.has_down_index_per_sample, call.has_up_index_per_sample,
                      call.has_gate_per_row) = std::tuple_cat(per_sample_or_row);
             std::tie(call.scale_value, call.pre_norm_eps, call.post_norm_eps) =
                 std::tuple_cat(scale_and_eps);
             call.activation = static_cast<Activation>(activation);
             call.pooling = static_cast<Pooling>(pooling);
             call.residual_from = static_cast<ResidualFrom>(residual_from);
             call.has_skip = has_skip, call.skip_below = skip_below;
             call.dropout_threshold = threshold, call.dropout_scale = dropout_scale;
             return call;
           }),
           py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("masters"), py::arg("sizes"),
           py::arg("per_sample_or_row"), py::arg("activation"), py::arg("pooling"),
           py::arg("residual_from"), py::arg("scale_and_eps"), py::arg("has_skip"),
           py::arg("skip_below"), py::arg("threshold"), py::arg("dropout_scale"))
      .def(
          "workspace_bytes",
          [](const CpuCall& plan, bool is_backward, uint32_t given, int threads) {
            CpuCall call = plan;
            for (int i = 0; i < kInputs; ++i) call.input[i] = given >> i & 1u ? &plan : nullptr;
            call.threads = threads;
            return cpu::with_isa(call.isa, [&](auto isa) {
              return is_backward ? cpu_backward_workspace_bytes<decltype(isa)::value>(call)
                                 : cpu_forward_workspace_bytes<decltype(isa)::value>(call);
            });
          },
          py::kw_only(), py::arg("is_backward"), py::arg("given"), py::arg("threads"))
      .def(
          "forward",
          [=](const CpuCall& plan, const Addresses& inputs, Address y, Address gate_value,
              Address h, Address workspace, uint64_t seed, int threads) {
            CpuCall call = with_inputs(plan, inputs, workspace, seed, threads);
            call.y = at(y), call.gate_value = at<float>(gate_value), call.h = at(h);
            cpu::with_isa(call.isa, [&](auto isa) { cpu_forward<decltype(isa)::value>(call); });
          },
          py::kw_only(), py::arg("inputs"), py::arg("y"), py::arg("gate_value"), py::arg("h"),
          py::arg("workspace"), py::arg("seed"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "backward",
          [=](const CpuCall& plan, const Addresses& inputs, const Addresses& grads, Address dy,
              Address gate_value, Address h, Address workspace, uint64_t seed, int threads) {
            CpuCall call = with_inputs(plan, inputs, workspace, seed, threads);
            std::transform(grads.begin(), grads.end(), call.grad, [](Address a) { return at(a); });
            call.dy = at(dy), call.gate_value = at<float>(gate_value), call.h = at(h);
            cpu::with_isa(call.isa, [&](auto isa) { cpu_backward<decltype(isa)::value>(call); });
          },
          py::kw_only(), py::arg("inputs"), py::arg("grads"), py::arg("dy"), py::arg("gate_value"),
          py::arg("h"), py::arg("workspace"), py::arg("seed"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_gated_adapter(py::module_& m) {
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_on_cuda(m);
#endif
  bind_on_cpu(m);
}

}  // namespace pelt::bindings
