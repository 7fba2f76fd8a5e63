// The Python module: `_C` with the CUDA kernels, or `_C_sim` with the same kernels on the
// simulator.
//
// Tensors come as addresses: this file and everything below it know nothing of torch. Every
// function takes keywords only. A launcher releases the GIL; shapes and dtypes were checked by the
// contract.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(PELT_SIM)
#include "sim/executor.h"
#else
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "ops/gated_adapter/cpu.h"
#include "ops/prefix_attention/cpu.h"
#endif
#if defined(PELT_SIM) || defined(PELT_WITH_CUDA)
#define PELT_HAS_CUDA_KERNELS 1
#include "ops/gated_adapter/params.h"
#endif

namespace py = pybind11;

namespace {

using namespace pelt;

using Address = uintptr_t;
using TypedAddress =
    std::pair<Address, bool>;  // and whether it is float32 beside 16-bit activations

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#if defined(PELT_HAS_CUDA_KERNELS)
void bind_gated_adapter(py::module_& m) {
  using namespace pelt::gated_adapter;
  auto parameter = [](const TypedAddress& a) { return Parameter{at(a.first), a.second}; };
  auto grad = [](const TypedAddress& a) { return ParameterGrad{at(a.first), a.second}; };

  m.def(
      "gated_adapter_why_not",
      [](int dtype, int64_t B, int64_t S, int64_t D, int64_t R) {
        return why_not(static_cast<DType>(dtype), B, S, D, R);
      },
      py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("S"), py::arg("D"), py::arg("R"));

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<Inputs>(m, "GatedAdapterInputs")
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

#if !defined(PELT_SIM)
void bind_cpu(py::module_& m) {
  m.def(
      "cpu_isa", [] { return std::string(cpu::name_of(cpu::current_isa())); },
      "The instruction set that the CPU kernels use.");
  m.def("choose_cpu_isa", &cpu::choose_isa, py::arg("name"),
        "Makes the CPU kernels use an instruction set by name; \"\" is the best again.");
  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < cpu::kIsaCount; ++i) {
          const auto isa = static_cast<cpu::Isa>(i);
          if (cpu::is_supported(isa)) names.push_back(cpu::name_of(isa));
        }
        return names;
      },
      "The instruction sets that this processor runs.");

  m.def(
      "fill_dropout",
      [](Address out, int64_t rows, int64_t columns, int element_bytes, uint64_t kept_bits,
         uint32_t threshold, uint64_t seed, uint64_t first_group, int threads) {
        const cpu::DropoutFill fill{at(out),   rows, columns,     element_bytes, kept_bits,
                                    threshold, seed, first_group, threads};
        cpu::with_isa([&](auto isa) { cpu::fill_dropout<decltype(isa)::value>(fill); });
      },
      py::kw_only(), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("element_bytes"),
      py::arg("kept_bits"), py::arg("threshold"), py::arg("seed"), py::arg("first_group"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "philox4x32_10",
      [](std::pair<uint64_t, uint64_t> counter, uint64_t key) {
        std::array<uint32_t, 4> words;
        cpu::with_isa([&](auto isa) {
          cpu::philox_block<decltype(isa)::value>({counter.first, counter.second}, key, words);
        });
        return words;
      },
      py::kw_only(), py::arg("counter"), py::arg("key"),
      "The four words of one counter and key, given in 64-bit halves, the low one first.");
}
// Of a prefix: k, v, index, length, and where its gradients go (0 in forward).
using SegmentArguments = std::tuple<TypedAddress, TypedAddress, Address, int64_t, Address, Address>;

void bind_prefix_attention_cpu(py::module_& m) {
  using namespace pelt::prefix_attention;
  auto tensor = [](const TypedAddress& a) { return CpuTensor{at(a.first), a.second}; };

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "PrefixAttentionCpuInputs")
      .def(py::init([=](bool is_float32, const std::array<int64_t, 6>& sizes, Address q, Address k,
                        Address v, const std::array<int64_t, 3>& q_strides,
                        const std::array<int64_t, 3>& k_strides,
                        const std::array<int64_t, 3>& v_strides,
                        const std::vector<SegmentArguments>& prefixes, TypedAddress gate,
                        bool has_gate_per_head, Address key_mask, Address lengths,
                        TypedAddress bias, std::pair<int64_t, int64_t> bias_strides, bool is_causal,
                        float scale, float kept, uint32_t threshold, uint64_t seed, int threads) {
             CpuInputs in;
             in.is_float32 = is_float32;
             std::tie(in.B, in.H, in.G, in.S, in.N, in.E) = std::tuple_cat(sizes);
             in.q = at(q), in.k = at(k), in.v = at(v);
             std::copy(q_strides.begin(), q_strides.end(), in.q_strides);
             std::copy(k_strides.begin(), k_strides.end(), in.k_strides);
             std::copy(v_strides.begin(), v_strides.end(), in.v_strides);
             for (const auto& [keys, values, index, length, dk, dv] : prefixes) {
               in.prefix[in.segments++] = {tensor(keys), tensor(values), at<const int64_t>(index),
                                           length,       at<float>(dk),  at<float>(dv)};
             }
             in.gate = tensor(gate);
             in.has_gate_per_head = has_gate_per_head;
             in.key_mask = at<const bool>(key_mask);
             in.lengths = at<const int64_t>(lengths);
             in.bias = tensor(bias);
             in.bias_strides[0] = bias_strides.first;
             in.bias_strides[1] = bias_strides.second;
             in.is_causal = is_causal;
             in.scale = scale;
             in.kept = kept;
             in.threshold = threshold;
             in.seed = seed;
             in.threads = threads;
             return in;
           }),
           py::kw_only(), py::arg("is_float32"), py::arg("sizes"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
           py::arg("prefixes"), py::arg("gate"), py::arg("has_gate_per_head"), py::arg("key_mask"),
           py::arg("lengths"), py::arg("bias"), py::arg("bias_strides"), py::arg("is_causal"),
           py::arg("scale"), py::arg("kept"), py::arg("threshold"), py::arg("seed"),
           py::arg("threads"));

  m.def(
      "prefix_attention_cpu_fwd",
      [](const CpuInputs& inputs, Address out, Address lse) {
        cpu::with_isa([&](auto isa) {
          forward_on_cpu<decltype(isa)::value>(inputs, at(out), at<float>(lse));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("out"), py::arg("lse"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "prefix_attention_cpu_bwd",
      [](const CpuInputs& inputs, Address dout, Address out, Address lse, Address dq, Address dk,
         Address dv, Address dgate, Address dbias, int64_t chunks) {
        const CpuBackward grad{at(dout), at(out),          at<const float>(lse), at(dq), at(dk),
                               at(dv),   at<float>(dgate), at<float>(dbias),     chunks};
        cpu::with_isa([&](auto isa) { backward_on_cpu<decltype(isa)::value>(inputs, grad); });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dout"), py::arg("out"), py::arg("lse"),
      py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dgate"), py::arg("dbias"),
      py::arg("chunks"), py::call_guard<py::gil_scoped_release>());
}

// A call without its tensors is made once and kept; forward and backward take the addresses of the
// contract's inputs, in its order.
void bind_gated_adapter_cpu(py::module_& m) {
  using namespace pelt::gated_adapter;
  using Addresses = std::array<Address, kInputs>;
  auto with_inputs = [](const CpuCall& plan, const Addresses& inputs, Address workspace,
                        uint64_t seed, int threads) {
    CpuCall call = plan;
    std::transform(inputs.begin(), inputs.end(), call.input, [](Address a) { return at(a); });
    call.workspace = at(workspace), call.seed = seed, call.threads = threads;
    return call;
  };
  py::class_<CpuCall>(m, "GatedAdapterCpu")
      .def(py::init([](int dtype, uint32_t masters, const std::array<int64_t, 6>& sizes,
                       const std::array<bool, 3>& per_sample_or_row, int activation, int pooling,
                       int residual_from, const std::array<float, 3>& scale_and_eps, bool has_skip,
                       float skip_below, uint32_t threshold, float dropout_scale) {
             CpuCall call;
             call.dtype = static_cast<DType>(dtype), call.masters = masters;
             std::tie(call.B, call.S, call.D, call.R, call.M, call.M_up) = std::tuple_cat(sizes);
             std::tie(call.has_down_index_per_sample, call.has_up_index_per_sample,
                      call.has_gate_per_row) = std::tuple_cat(per_sample_or_row);
             std::tie(call.scale_value, call.pre_norm_eps, call.post_norm_eps) =
                 std::tuple_cat(scale_and_eps);
             call.activation = static_cast<Activation>(activation);
             call.pooling = static_cast<CpuPooling>(pooling);
             call.residual_from = static_cast<CpuResidual>(residual_from);
             call.has_skip = has_skip, call.skip_below = skip_below;
             call.dropout_threshold = threshold, call.dropout_scale = dropout_scale;
             return call;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("masters"), py::arg("sizes"),
           py::arg("per_sample_or_row"), py::arg("activation"), py::arg("pooling"),
           py::arg("residual_from"), py::arg("scale_and_eps"), py::arg("has_skip"),
           py::arg("skip_below"), py::arg("threshold"), py::arg("dropout_scale"))
      .def(
          "workspace_bytes",
          [](const CpuCall& plan, bool is_backward, uint32_t given, int threads) {
            CpuCall call = plan;
            for (int i = 0; i < kInputs; ++i) call.input[i] = given >> i & 1u ? &plan : nullptr;
            call.threads = threads;
            int64_t bytes = 0;  // enough for each instruction set that may be chosen
            for (int i = 0; i < cpu::kIsaCount; ++i) {
              if (!cpu::is_supported(static_cast<cpu::Isa>(i))) continue;
              bytes = std::max(
                  bytes, cpu::with_isa(static_cast<cpu::Isa>(i), [&](auto isa) {
                    return is_backward ? cpu_backward_workspace_bytes<decltype(isa)::value>(call)
                                       : cpu_forward_workspace_bytes<decltype(isa)::value>(call);
                  }));
            }
            return bytes;
          },
          py::kw_only(), py::arg("is_backward"), py::arg("given"), py::arg("threads"))
      .def(
          "forward",
          [=](const CpuCall& plan, const Addresses& inputs, Address y, Address gate_value,
              Address h, Address workspace, uint64_t seed, int threads) {
            CpuCall call = with_inputs(plan, inputs, workspace, seed, threads);
            call.y = at(y), call.gate_value = at<float>(gate_value), call.h = at(h);
            cpu::with_isa([&](auto isa) { cpu_forward<decltype(isa)::value>(call); });
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
            cpu::with_isa([&](auto isa) { cpu_backward<decltype(isa)::value>(call); });
          },
          py::kw_only(), py::arg("inputs"), py::arg("grads"), py::arg("dy"), py::arg("gate_value"),
          py::arg("h"), py::arg("workspace"), py::arg("seed"), py::arg("threads"),
          py::call_guard<py::gil_scoped_release>());
}
#endif

// What the module was made of, for bug reports and benchmark records.
py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(PELT_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(PELT_MODULE, m) {
#if defined(PELT_SIM)
  m.doc() = "The CUDA kernels on the simulator: CPU memory in, CPU memory out.";
  m.def("set_seed", &sim::set_seed, py::arg("seed"),
        "Seeds the order of threads, warps and blocks. A sound kernel's results do not depend on "
        "it.");
#else
  m.doc() = "The compiled kernels.";
#endif
  m.def("build_info", &build_info, "What the module was made of.");
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_gated_adapter(m);
#endif
#if !defined(PELT_SIM)
  bind_cpu(m);
  bind_gated_adapter_cpu(m);
  bind_prefix_attention_cpu(m);
#endif
}
