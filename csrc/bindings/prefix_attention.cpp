#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "bindings/bind.h"

#if defined(PELT_HAS_CUDA_KERNELS)
#include "ops/prefix_attention/params.h"
#endif
#if defined(PELT_HAS_CPU_KERNELS)
#include "cpu/isa.h"
#include "ops/prefix_attention/cpu.h"
#endif

namespace pelt::bindings {

namespace {

using namespace pelt::prefix_attention;

#if defined(PELT_HAS_CUDA_KERNELS)
// Of a prefix: k, v, index, A_i and P_i.
using PrefixArguments = std::tuple<TypedAddress, TypedAddress, Address, int, int>;
// Of its gradients: k, v.
using PrefixGradArguments = std::pair<TypedAddress, TypedAddress>;
using ThreeStrides = std::array<int64_t, 3>;

void bind_on_cuda(py::module_& m) {
  auto parameter = [](const TypedAddress& a) { return Parameter{at(a.first), a.second}; };
  auto grad = [](const TypedAddress& a) { return ParameterGrad{at(a.first), a.second}; };
  auto strides = [](const ThreeStrides& s) { return Strides{s[0], s[1], s[2]}; };

  m.def(
      "prefix_attention_why_not",
      [](int dtype, int64_t B, int64_t H, int64_t S, int64_t N, int64_t P, int64_t E) {
        return why_not(static_cast<DType>(dtype), B, H, S, N, P, E);
      },
      py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("H"), py::arg("S"), py::arg("N"),
      py::arg("P"), py::arg("E"));

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<Inputs>(m, "PrefixAttentionInputs")
      .def(
          py::init([=](int dtype, const std::array<int, 6>& sizes, Address q, Address k, Address v,
                       const ThreeStrides& q_strides, const ThreeStrides& k_strides,
                       const ThreeStrides& v_strides, const std::vector<PrefixArguments>& prefixes,
                       TypedAddress gate, bool has_gate_per_head, Address key_mask, Address lengths,
                       TypedAddress bias, std::pair<int64_t, int64_t> bias_strides, bool is_causal,
                       float scale, double dropout_p, uint64_t seed) {
            Inputs in;
            in.dtype = static_cast<DType>(dtype);
            std::tie(in.B, in.H, in.G, in.S, in.N, in.E) = std::tuple_cat(sizes);
            in.q = at(q), in.k = at(k), in.v = at(v);
            in.q_strides = strides(q_strides);
            in.k_strides = strides(k_strides);
            in.v_strides = strides(v_strides);
            for (const auto& [keys, values, index, members, length] : prefixes) {
              in.prefix[in.prefixes++] = {parameter(keys),
                                          parameter(values),
                                          at<const int64_t>(index),
                                          members,
                                          length,
                                          in.P};
              in.P += length;
            }
            in.gate = parameter(gate);
            in.has_gate_per_head = has_gate_per_head;
            in.key_mask = at<const bool>(key_mask);
            in.lengths = at<const int64_t>(lengths);
            in.bias = parameter(bias);
            std::tie(in.bias_batch_stride, in.bias_head_stride) = bias_strides;
            in.is_causal = is_causal;
            in.scale = scale;
            in.dropout = Dropout::with_probability(dropout_p, seed);
            in.dropout_keys = PhiloxKeys::of(seed);
            return in;
          }),
          py::kw_only(), py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k"),
          py::arg("v"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
          py::arg("prefixes"), py::arg("gate"), py::arg("has_gate_per_head"), py::arg("key_mask"),
          py::arg("lengths"), py::arg("bias"), py::arg("bias_strides"), py::arg("is_causal"),
          py::arg("scale"), py::arg("dropout_p"), py::arg("seed"));

  m.def(
      "prefix_attention_fwd",
      [](const Inputs& inputs, Address out, Address lse, Address stream) {
        ForwardParams params;
        params.in = inputs;
        params.out = at(out);
        params.lse = at<float>(lse);
        launch_prefix_attention_fwd(params, at(stream));
      },
      py::kw_only(), py::arg("inputs"), py::arg("out"), py::arg("lse"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  // Gradients that are not wanted have no address; the workspace's size follows from those that
  // are.
  py::class_<BackwardParams>(m, "PrefixAttentionBackward")
      .def(py::init([=](const Inputs& inputs, Address dout, Address out, Address lse, Address dq,
                        Address dk, Address dv, const std::vector<PrefixGradArguments>& dprefixes,
                        TypedAddress dgate, TypedAddress dbias,
                        std::pair<bool, bool> is_dbias_shared) {
             BackwardParams params;
             params.in = inputs;
             params.dout = at(dout), params.out = at(out), params.lse = at<const float>(lse);
             params.dq = at(dq), params.dk = at(dk), params.dv = at(dv);
             for (int i = 0; i < inputs.prefixes; ++i) {
               params.prefix[i].dprefix_k = grad(dprefixes.at(i).first);
               params.prefix[i].dprefix_v = grad(dprefixes.at(i).second);
             }
             params.dgate = grad(dgate);
             params.dbias = grad(dbias);
             std::tie(params.is_dbias_shared_by_batch, params.is_dbias_shared_by_heads) =
                 is_dbias_shared;
             return params;
           }),
           py::kw_only(), py::arg("inputs"), py::arg("dout"), py::arg("out"), py::arg("lse"),
           py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dprefixes"), py::arg("dgate"),
           py::arg("dbias"), py::arg("is_dbias_shared"))
      .def_property_readonly("workspace_bytes", &backward_workspace_bytes)
      .def(
          "launch",
          [](const BackwardParams& params, Address workspace, Address stream) {
            launch_prefix_attention_bwd(params, at(workspace), at(stream));
          },
          py::kw_only(), py::arg("workspace"), py::arg("stream"),
          py::call_guard<py::gil_scoped_release>());
}
#endif

#if defined(PELT_HAS_CPU_KERNELS)

// Of a prefix: k, v, index, length, and where its gradients go (0 in forward).
using SegmentArguments = std::tuple<TypedAddress, TypedAddress, Address, int64_t, Address, Address>;

void bind_on_cpu(py::module_& m) {
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

#endif

}  // namespace

void bind_prefix_attention(py::module_& m) {
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_on_cuda(m);
#endif
#if defined(PELT_HAS_CPU_KERNELS)
  bind_on_cpu(m);
#endif
}

}  // namespace pelt::bindings
