#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "bindings/bind.h"

#if defined(PELT_HAS_CUDA_KERNELS)
#include "ops/lora_linear/params.h"
#endif
#include "cpu/isa.h"
#include "ops/lora_linear/cpu.h"

namespace pelt::bindings {

namespace {

using namespace pelt::lora_linear;

// Sizes R, size, offset, M, N; scale; is there an index for each sample (of a, of b), is the gate
// per row; the learned gate's number; which of a, b and gate are float32.
using BranchPlan =
    std::tuple<std::array<int64_t, 5>, float, std::array<bool, 3>, int, std::array<bool, 3>>;
using GatePlan = std::tuple<int, bool, bool>;    // pooling; are weight and bias float32
using BranchInputs = std::array<Address, 5>;     // a, b, a_index, b_index, gate
using GateInputs = std::array<Address, 4>;       // weight, bias, value, dvalue
using BranchGradients = std::array<Address, 3>;  // of a, b, gate
using GateGradients = std::array<Address, 2>;    // of weight, bias
// Weight (0: a GEMM of others' multiplies by it), bias; is the bias float32, the weight transposed.
using BaseInputs = std::tuple<Address, Address, bool, bool>;

#if defined(PELT_HAS_CUDA_KERNELS)
Inputs make_inputs(int dtype, const std::array<int64_t, 4>& sizes,
                   const std::vector<BranchPlan>& branches, const std::vector<GatePlan>& gates,
                   uint32_t threshold, float dropout_scale) {
  Inputs in;
  in.dtype = static_cast<DType>(dtype);
  std::tie(in.B, in.S, in.Din, in.Dout) = std::tuple_cat(sizes);
  in.branches = static_cast<int>(std::min<size_t>(branches.size(), kMaxBranches));
  in.gates = static_cast<int>(std::min<size_t>(gates.size(), kMaxGates));
  for (int g = 0; g < in.gates; ++g) {
    Gate& gate = in.gate[g];
    gate.pooling = static_cast<Pooling>(std::get<0>(gates[g]));
    gate.gate_weight.is_float32 = std::get<1>(gates[g]);
    gate.gate_bias.is_float32 = std::get<2>(gates[g]);
  }
  for (int i = 0; i < in.branches; ++i) {
    Branch& b = in.branch[i];
    const auto& [of, scale, per_sample_or_row, learned_gate, is_float32] = branches[i];
    std::tie(b.R, b.size, b.offset, b.a_members, b.b_members) = std::tuple_cat(of);
    b.scale = scale, b.learned_gate = learned_gate;
    std::tie(b.has_a_index_per_sample, b.has_b_index_per_sample, b.has_gate_per_row) =
        std::tuple_cat(per_sample_or_row);
    std::tie(b.a.is_float32, b.b.is_float32, b.gate.is_float32) = std::tuple_cat(is_float32);
    b.first = in.ranks;
    in.ranks += b.R;
    if (learned_gate >= 0 && learned_gate < in.gates) in.gate[learned_gate].branch = i;
  }
  in.dropout = {0, threshold, dropout_scale};
  return in;
}

Inputs with_addresses(const Inputs& plan, Address x, Address mask,
                      const std::vector<BranchInputs>& branches,
                      const std::vector<GateInputs>& gates, uint64_t seed) {
  Inputs in = plan;
  in.x = at(x), in.mask = at<const bool>(mask), in.dropout.seed = seed;
  for (int i = 0; i < in.branches; ++i) {
    Branch& b = in.branch[i];
    const BranchInputs& from = branches.at(i);
    b.a.data = at(from[0]), b.b.data = at(from[1]);
    b.a_index = at<const int64_t>(from[2]), b.b_index = at<const int64_t>(from[3]);
    b.gate.data = at(from[4]);
  }
  for (int g = 0; g < in.gates; ++g) {
    in.gate[g].gate_weight.data = at(gates.at(g)[0]);
    in.gate[g].gate_bias.data = at(gates.at(g)[1]);
    in.gate[g].value = at<float>(gates.at(g)[2]);
  }
  return in;
}

BackwardParams with_grads(const Inputs& in, const std::vector<BranchGradients>& branch_grads,
                          const std::vector<GateGradients>& gate_grads) {
  BackwardParams p;
  p.in = in;
  for (int i = 0; i < in.branches; ++i) {
    const BranchGradients& to = branch_grads.at(i);
    const Branch& b = in.branch[i];
    p.grads.branch[i].da = {at(to[0]), b.a.is_float32};
    p.grads.branch[i].db = {at(to[1]), b.b.is_float32};
    p.grads.branch[i].dgate = {at(to[2]), b.gate.is_float32};
  }
  for (int g = 0; g < in.gates; ++g) {
    p.grads.gate[g].dgate_weight = {at(gate_grads.at(g)[0]), in.gate[g].gate_weight.is_float32};
    p.grads.gate[g].dgate_bias = {at(gate_grads.at(g)[1]), in.gate[g].gate_bias.is_float32};
  }
  return p;
}

std::tuple<const void*, Parameter, bool> base_of(const BaseInputs& base) {
  const auto& [weight, bias, has_float32_bias, is_transposed] = base;
  return {at(weight), Parameter{at(bias), has_float32_bias}, is_transposed};
}

// Of each branch R, size, offset and its learned gate's number or -1; of each learned gate its
// pooling.
std::string why_not_single_of(const std::array<int64_t, 4>& sizes,
                              const std::vector<std::array<int, 4>>& branches,
                              const std::vector<int>& gates) {
  std::vector<BranchPlan> of_branches;
  std::vector<GatePlan> of_gates;
  for (const auto& [R, size, offset, gate] : branches) {
    of_branches.push_back({{R, size, offset, 1, 1}, 1.0f, {}, gate, {}});
  }
  for (int pooling : gates) of_gates.emplace_back(pooling, false, false);
  return why_not_single(make_inputs(0, sizes, of_branches, of_gates, 0, 1.0f));
}

void bind_on_cuda(py::module_& m) {
  m.def(
      "lora_linear_why_not",
      [](int dtype, const std::array<int64_t, 4>& sizes, int64_t branches, int64_t gates) {
        return why_not(static_cast<DType>(dtype), sizes[0], sizes[1], sizes[2], sizes[3], branches,
                       gates);
      },
      py::kw_only(), py::arg("dtype"), py::arg("sizes"), py::arg("branches"), py::arg("gates"));
  m.def("lora_linear_why_not_single", &why_not_single_of, py::kw_only(), py::arg("sizes"),
        py::arg("branches"), py::arg("gates"));
  py::class_<Inputs>(m, "LoraLinearCuda", py::module_local())
      .def(py::init(&make_inputs), py::kw_only(), py::arg("dtype"), py::arg("sizes"),
           py::arg("branches"), py::arg("gates"), py::arg("threshold"), py::arg("dropout_scale"))
      .def_property_readonly("forward_workspace_bytes", &forward_workspace_bytes)
      .def(
          "backward_workspace_bytes",
          [](const Inputs& plan, const std::vector<BranchGradients>& branch_grads,
             const std::vector<GateGradients>& gate_grads) {
            return backward_workspace_bytes(with_grads(plan, branch_grads, gate_grads));
          },
          py::kw_only(), py::arg("branch_grads"), py::arg("gate_grads"))
      .def(
          "forward",
          [](const Inputs& plan, Address x, Address mask, Address s,
             const std::vector<BranchInputs>& branches, const std::vector<GateInputs>& gates,
             const BaseInputs& base, Address y, Address workspace, uint64_t seed, Address stream) {
            ForwardParams p;
            p.in = with_addresses(plan, x, mask, branches, gates, seed);
            p.y = at(y), p.s = at(s);
            std::tie(p.weight, p.bias, p.is_transposed) = base_of(base);
            launch_lora_linear_fwd(p, at(workspace), at(stream));
          },
          py::kw_only(), py::arg("x"), py::arg("mask"), py::arg("s"), py::arg("branches"),
          py::arg("gates"), py::arg("base"), py::arg("y"), py::arg("workspace"), py::arg("seed"),
          py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "backward",
          [](const Inputs& plan, Address x, Address mask, Address s,
             const std::vector<BranchInputs>& branches, const std::vector<GateInputs>& gates,
             const std::vector<BranchGradients>& branch_grads,
             const std::vector<GateGradients>& gate_grads, const BaseInputs& base, Address dy,
             Address dx, Address workspace, uint64_t seed, Address stream) {
            BackwardParams p = with_grads(with_addresses(plan, x, mask, branches, gates, seed),
                                          branch_grads, gate_grads);
            p.dy = at(dy), p.s = at(s), p.dx = at(dx);
            std::tie(p.weight, std::ignore, p.is_transposed) = base_of(base);
            for (int g = 0; g < p.in.gates; ++g) {
              p.grads.gate[g].dvalue = at<const float>(gates.at(g)[3]);
            }
            launch_lora_linear_bwd(p, at(workspace), at(stream));
          },
          py::kw_only(), py::arg("x"), py::arg("mask"), py::arg("s"), py::arg("branches"),
          py::arg("gates"), py::arg("branch_grads"), py::arg("gate_grads"), py::arg("base"),
          py::arg("dy"), py::arg("dx"), py::arg("workspace"), py::arg("seed"), py::arg("stream"),
          py::call_guard<py::gil_scoped_release>());
}
#endif

CpuCall make_plan(const std::string& isa, int dtype, const std::array<int64_t, 4>& sizes,
                  const std::vector<BranchPlan>& branches, const std::vector<GatePlan>& gates,
                  uint32_t threshold, float dropout_scale) {
  CpuCall call;
  call.isa = cpu::isa_by_name(isa);
  call.dtype = static_cast<DType>(dtype);
  std::tie(call.B, call.S, call.Din, call.Dout) = std::tuple_cat(sizes);
  call.branches = static_cast<int>(std::min<size_t>(branches.size(), kCpuBranches));
  for (int i = 0; i < call.branches; ++i) {
    CpuBranch& b = call.branch[i];
    const auto& [of, scale, per_sample_or_row, learned_gate, is_float32] = branches[i];
    std::tie(b.R, b.size, b.offset, b.M, b.N) = std::tuple_cat(of);
    b.scale = scale, b.learned_gate = learned_gate;
    std::tie(b.has_a_index_per_sample, b.has_b_index_per_sample, b.has_gate_per_row) =
        std::tuple_cat(per_sample_or_row);
    std::tie(b.a.is_float32, b.b.is_float32, b.gate.is_float32) = std::tuple_cat(is_float32);
  }
  call.gates = static_cast<int>(std::min<size_t>(gates.size(), kCpuGates));
  for (int j = 0; j < call.gates; ++j) {
    CpuGate& gate = call.gate[j];
    gate.pooling = static_cast<Pooling>(std::get<0>(gates[j]));
    gate.weight.is_float32 = std::get<1>(gates[j]), gate.bias.is_float32 = std::get<2>(gates[j]);
  }
  call.dropout_threshold = threshold, call.dropout_scale = dropout_scale;
  return call;
}

CpuCall with_inputs(const CpuCall& plan, Address x, Address mask, Address s,
                    const std::vector<BranchInputs>& branches, const std::vector<GateInputs>& gates,
                    Address workspace, uint64_t seed, int threads) {
  CpuCall call = plan;
  call.x = at(x), call.mask = at<const bool>(mask), call.s = at(s), call.workspace = at(workspace);
  call.seed = seed, call.threads = threads;
  for (int i = 0; i < call.branches; ++i) {
    CpuBranch& b = call.branch[i];
    const BranchInputs& from = branches.at(i);
    b.a.data = at(from[0]), b.b.data = at(from[1]);
    b.a_index = at<const int64_t>(from[2]), b.b_index = at<const int64_t>(from[3]);
    b.gate.data = at(from[4]);
  }
  for (int j = 0; j < call.gates; ++j) {
    CpuGate& gate = call.gate[j];
    const GateInputs& from = gates.at(j);
    gate.weight.data = at(from[0]), gate.bias.data = at(from[1]);
    gate.value = at<float>(from[2]), gate.dvalue = at<const float>(from[3]);
  }
  return call;
}

void bind_on_cpu(py::module_& m) {
  py::class_<CpuCall>(m, "LoraLinearCpu", py::module_local())
      .def(py::init(&make_plan), py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("sizes"),
           py::arg("branches"), py::arg("gates"), py::arg("threshold"), py::arg("dropout_scale"))
      .def_property_readonly_static("max_branches", [](const py::object&) { return kCpuBranches; })
      .def_property_readonly_static("max_gates", [](const py::object&) { return kCpuGates; })
      .def(
          "workspace_bytes",
          [](const CpuCall& plan, bool is_backward, int threads) {
            CpuCall call = plan;
            call.threads = threads;
            return cpu::with_isa(call.isa, [&](auto isa) {
              return is_backward ? cpu_backward_workspace_bytes<decltype(isa)::value>(call)
                                 : cpu_forward_workspace_bytes<decltype(isa)::value>(call);
            });
          },
          py::kw_only(), py::arg("is_backward"), py::arg("threads"))
      .def(
          "forward",
          [](const CpuCall& plan, Address x, Address mask, Address s,
             const std::vector<BranchInputs>& branches, const std::vector<GateInputs>& gates,
             Address y, Address workspace, uint64_t seed, int threads) {
            CpuCall call = with_inputs(plan, x, mask, s, branches, gates, workspace, seed, threads);
            call.y = at(y);
            cpu::with_isa(call.isa, [&](auto isa) { cpu_forward<decltype(isa)::value>(call); });
          },
          py::kw_only(), py::arg("x"), py::arg("mask"), py::arg("s"), py::arg("branches"),
          py::arg("gates"), py::arg("y"), py::arg("workspace"), py::arg("seed"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "backward",
          [](const CpuCall& plan, Address x, Address mask, Address s,
             const std::vector<BranchInputs>& branches, const std::vector<GateInputs>& gates,
             const std::vector<BranchGradients>& branch_grads,
             const std::vector<GateGradients>& gate_grads, Address dy, Address dx,
             Address workspace, uint64_t seed, int threads) {
            CpuCall call = with_inputs(plan, x, mask, s, branches, gates, workspace, seed, threads);
            call.dy = at(dy), call.dx = at(dx);
            for (int i = 0; i < call.branches; ++i) {
              CpuBranch& b = call.branch[i];
              const BranchGradients& to = branch_grads.at(i);
              b.a.grad = at(to[0]), b.b.grad = at(to[1]), b.gate.grad = at(to[2]);
            }
            for (int j = 0; j < call.gates; ++j) {
              const GateGradients& to = gate_grads.at(j);
              call.gate[j].weight.grad = at(to[0]), call.gate[j].bias.grad = at(to[1]);
            }
            cpu::with_isa(call.isa, [&](auto isa) { cpu_backward<decltype(isa)::value>(call); });
          },
          py::kw_only(), py::arg("x"), py::arg("mask"), py::arg("s"), py::arg("branches"),
          py::arg("gates"), py::arg("branch_grads"), py::arg("gate_grads"), py::arg("dy"),
          py::arg("dx"), py::arg("workspace"), py::arg("seed"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_lora_linear(py::module_& m) {
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_on_cuda(m);
#endif
  bind_on_cpu(m);
}

}  // namespace pelt::bindings
